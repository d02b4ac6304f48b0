//! Snapshots, and volumes that are made of them on another node.

use crate::agent::{ID, Log, Manners, OTHER, Ran, Treat, run, unix, volume};
use dmlocal_proto::v1::{Origin, Volume, VolumeState};
use tempfile::tempdir;

/// Makes `id` on node b of the snapshot [`OTHER`] on node a; returns what dmlocalctl
/// did and all calls that changed something.
fn make(id: &str, a: Manners, b: Manners) -> (Ran, Vec<String>) {
    let dir = tempdir().unwrap();
    let log = Log::default();
    let a = unix(dir.path(), "node-a", &log, a);
    let b = unix(dir.path(), "node-b", &log, b);
    let order = ["volume", "create", id, "--from-snapshot", OTHER, "--from", &a.endpoint];
    let ran = run(&b.endpoint, &[&order[..], &["--output=json"]].concat());
    let calls =
        log.lock().unwrap().iter().filter(|call| !call.contains("GetNode")).cloned().collect();
    (ran, calls)
}

/// No fake agent knows it.
const NEW: &str = "7f2f5a9e-53cc-4b8b-8f0e-9b1f3c2d4e60";

fn grant() -> String {
    let to = "node-b nqn.host.node-b https://node-b:7000";
    format!("node-a Grant {NEW} {to} false of snapshot {OTHER}")
}

#[test]
fn the_node_that_has_the_snapshot_grants_and_the_other_receives() {
    let (ran, calls) = make(NEW, Manners::default(), Manners::default());
    assert_eq!(ran.json()["state"], "hydrating");
    assert_eq!(calls, [grant(), format!("node-b Receive {NEW} from node-a")]);
}

#[test]
fn a_volume_that_was_made_of_it_before_is_the_answer() {
    let source = Origin { snapshot_id: Some(OTHER.into()), volume_id: None };
    let made = Volume { source: Some(source), ..volume(VolumeState::Local) };
    let there = Manners { states: vec![made], ..Manners::default() };
    let (ran, calls) = make(ID, Manners::default(), there);
    assert_eq!(ran.json()["source"]["snapshot_id"], OTHER);
    assert!(calls.is_empty(), "{calls:?}");
}

#[test]
fn a_volume_of_another_content_is_in_the_way() {
    let (ran, calls) = make(ID, Manners::default(), Manners::default());
    let failure = ran.failure();
    assert_eq!(failure["reason"], "VOLUME_EXISTS");
    assert_eq!(failure["metadata"]["field"], "source");
    assert!(calls.is_empty(), "{calls:?}");
}

#[test]
fn a_refusal_gives_the_grant_back() {
    let full = Manners { receive: Treat::Refuse("NO_ROOM"), ..Manners::default() };
    let (ran, calls) = make(NEW, Manners::default(), full);
    assert_eq!(ran.failure()["reason"], "NO_ROOM");
    let receive = format!("node-b Receive {NEW} from node-a");
    assert_eq!(calls, [grant(), receive, format!("node-a Revoke {NEW}")]);
}

#[test]
fn the_same_node_is_asked_for_it_at_once() {
    let dir = tempdir().unwrap();
    let log = Log::default();
    let a = unix(dir.path(), "node-a", &log, Manners::default());
    let order = ["volume", "create", NEW, "--from-volume", ID, "--from", &a.endpoint];
    assert_eq!(run(&a.endpoint, &order).code, Some(0));
    let calls = log.lock().unwrap().clone();
    assert_eq!(calls.last().unwrap(), &format!("node-a Create {NEW} 0  of volume {ID}"));
}

#[test]
fn what_a_volume_begins_with_is_said_once() {
    for bad in [
        &["volume", "create", NEW][..],
        &["volume", "create", NEW, "--size", "1MiB", "--from-snapshot", OTHER],
        &["volume", "create", NEW, "--from-volume", ID, "--from-snapshot", OTHER],
        &["volume", "create", NEW, "--size", "1MiB", "--from", "unix:///x"],
    ] {
        assert_eq!(run("unix:///unused", bad).code, Some(2), "{bad:?}");
    }
    let upper = OTHER.to_uppercase();
    let ran =
        run("unix:///unused", &["volume", "revert", ID, "--snapshot", &upper, "--output=json"]);
    assert_eq!(ran.failure()["reason"], "ID_INVALID");
}

#[test]
fn snapshots_are_listed_with_their_readers() {
    let dir = tempdir().unwrap();
    let log = Log::default();
    let a = unix(dir.path(), "node-a", &log, Manners::default());
    let table = run(&a.endpoint, &["snapshot", "list"]).out;
    let mut lines = table.lines();
    assert!(lines.next().unwrap().starts_with("ID "), "{table}");
    let words: Vec<_> = lines.next().unwrap().split_whitespace().collect();
    assert_eq!(words, [OTHER, ID, "64MiB", "available", "fast", "1"], "{table}");
    let json = run(&a.endpoint, &["snapshot", "list", "--output=json"]).json();
    assert_eq!((&json[0]["id"], &json[0]["state"]), (&OTHER.into(), &"available".into()));
}
