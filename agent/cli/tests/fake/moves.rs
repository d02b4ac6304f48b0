//! `volume move`: who is asked for what in which order, and what is undone.

use crate::agent::{DEVICE, ID, Log, Manners, Ran, Treat, run, unix, volume};
use dmlocal_proto::v1::VolumeState;
use serde_json::Value;
use tempfile::tempdir;
use tonic::Code;

/// Moves [`ID`] from node a to node b; returns what dmlocalctl did and all calls
/// that changed something.
fn move_volume(a: Manners, b: Manners, args: &[&str]) -> (Ran, Vec<String>) {
    let dir = tempdir().unwrap();
    let log = Log::default();
    let a = unix(dir.path(), "node-a", &log, a);
    let b = unix(dir.path(), "node-b", &log, b);
    let order = ["volume", "move", ID, "--from", &a.endpoint, "--to", &b.endpoint];
    let ran = run("unix:///unused", &[&order, args].concat());
    let calls =
        log.lock().unwrap().iter().filter(|call| !call.contains("GetNode")).cloned().collect();
    (ran, calls)
}

fn grant(hold: bool) -> String {
    format!("node-a Grant {ID} node-b nqn.host.node-b https://node-b:7000 {hold}")
}

fn receive() -> String {
    format!("node-b Receive {ID} from node-a")
}

fn revoke() -> String {
    format!("node-a Revoke {ID}")
}

fn receiving(receive: Treat) -> Manners {
    Manners { receive, ..Manners::default() }
}

#[test]
fn the_source_grants_then_the_destination_receives_and_its_device_is_printed() {
    let (ran, calls) = move_volume(Manners::default(), Manners::default(), &[]);
    assert_eq!((ran.code, ran.out, ran.err), (Some(0), format!("{DEVICE}\n"), String::new()));
    assert_eq!(calls, [grant(false), receive()]);
}

#[test]
fn a_held_move_asks_for_a_grant_that_holds() {
    let (ran, calls) = move_volume(Manners::default(), Manners::default(), &["--hold"]);
    assert_eq!(ran.code, Some(0));
    assert_eq!(calls, [grant(true), receive()]);
}

#[test]
fn where_the_data_is_to_be_is_passed_on() {
    for (flag, mode) in [("--remote", "RECEIVE_MODE_REMOTE"), ("--local", "RECEIVE_MODE_LOCAL")] {
        let (ran, calls) = move_volume(Manners::default(), Manners::default(), &[flag]);
        assert_eq!(ran.code, Some(0));
        assert_eq!(calls, [grant(false), format!("{} {mode}", receive())]);
    }
}

#[test]
fn in_json_a_move_prints_the_volume() {
    let (ran, _) =
        move_volume(Manners::default(), Manners::default(), &["--hold", "--output=json"]);
    assert_eq!(ran.json()["state"], "held");
}

#[test]
fn a_move_to_the_same_node_is_refused_before_anything_is_granted() {
    let dir = tempdir().unwrap();
    let log = Log::default();
    let a = unix(dir.path(), "node-a", &log, Manners::default());
    let order = ["volume", "move", ID, "--from", &a.endpoint, "--to", &a.endpoint, "--output=json"];
    assert_eq!(run("unix:///unused", &order).failure()["reason"], "MOVE_TO_SELF");
    assert_eq!(*log.lock().unwrap(), ["node-a GetNode", "node-a GetNode"]);
}

#[test]
fn a_refused_grant_is_reported_and_nothing_else_is_asked() {
    let a = Manners { grant: Treat::Refuse("VOLUME_ATTACHED"), ..Manners::default() };
    let (ran, calls) = move_volume(a, Manners::default(), &["--output=json"]);
    assert_eq!(ran.failure()["reason"], "VOLUME_ATTACHED");
    assert_eq!(calls, [grant(false)]);
}

#[test]
fn a_refused_receive_gives_the_grant_back_and_reports_the_refusal() {
    for (treat, reason) in [
        (Treat::Refuse("NO_ROOM"), "NO_ROOM"),
        (Treat::RefuseBare(Code::Unimplemented), "ANSWER_WITHOUT_REASON"),
    ] {
        let (ran, calls) = move_volume(Manners::default(), receiving(treat), &["--output=json"]);
        assert_eq!(ran.failure()["reason"], reason);
        assert_eq!(calls, [grant(false), receive(), revoke()]);
    }
}

#[test]
fn when_the_grant_cannot_be_given_back_both_errors_are_reported() {
    let a = Manners { revoke: Treat::Refuse("GRANT_FENCED"), ..Manners::default() };
    let (ran, _) = move_volume(a, receiving(Treat::Refuse("NO_ROOM")), &["--output=json"]);
    let failure = ran.failure();
    assert_eq!(failure["reason"], "NO_ROOM");
    assert_eq!(failure["metadata"]["revoke_reason"], "GRANT_FENCED");
    let message = failure["message"].as_str().unwrap();
    assert!(message.contains("the agent refuses (GRANT_FENCED)"), "{message}");
    assert!(message.contains(failure["metadata"]["grant_id"].as_str().unwrap()));
}

#[test]
fn a_grant_that_is_over_counts_as_given_back() {
    let a = Manners { revoke: Treat::Refuse("GRANT_UNKNOWN"), ..Manners::default() };
    let (ran, _) = move_volume(a, receiving(Treat::Refuse("NO_ROOM")), &["--output=json"]);
    assert_eq!(ran.failure()["metadata"].get("revoke_reason"), None);
}

/// The destination may be using the volume: taking the grant away could cut it
/// off from the only complete copy.
#[test]
fn after_a_receive_without_an_answer_nothing_is_revoked_and_the_way_on_is_shown() {
    let cases: [(Treat, &[&str], &str); 3] = [
        (Treat::BreakOff, &[], "CONNECTION_LOST"),
        (Treat::Hang, &["--timeout", "2"], "DEADLINE_EXCEEDED"),
        (Treat::RefuseBare(Code::Unavailable), &[], "ANSWER_WITHOUT_REASON"),
    ];
    for (treat, args, cause) in cases {
        let args = [args, &["--output=json"]].concat();
        let (ran, calls) = move_volume(Manners::default(), receiving(treat), &args);
        let failure = ran.failure();
        assert_eq!(calls, [grant(false), receive()], "{cause}");
        assert_eq!(failure["reason"], "MOVE_UNCERTAIN");
        assert_eq!(failure["metadata"]["cause"], cause);
        let message = failure["message"].as_str().unwrap();
        let grant_id = failure["metadata"]["grant_id"].as_str().unwrap();
        for part in [grant_id, "node-b.sock status ", "node-a.sock volume abort "] {
            assert!(message.contains(part), "{part} in {message}");
        }
    }
}

/// Unlike a receive: no one can use a grant that was never passed on.
#[test]
fn after_a_grant_without_an_answer_it_is_revoked() {
    let a = Manners { grant: Treat::Hang, ..Manners::default() };
    let (ran, calls) = move_volume(a, Manners::default(), &["--timeout", "2", "--output=json"]);
    let failure = ran.failure();
    assert_eq!(failure["reason"], "DEADLINE_EXCEEDED");
    assert_eq!(calls, [grant(false), revoke()]);
}

#[test]
fn a_source_that_is_gone_after_the_grant_is_reported_with_the_grant() {
    let a = Manners { grant: Treat::BreakOff, ..Manners::default() };
    let (ran, calls) = move_volume(a, Manners::default(), &["--output=json"]);
    let failure = ran.failure();
    assert_eq!(failure["reason"], "CONNECTION_LOST");
    assert_eq!(failure["metadata"]["revoke_reason"], "CONNECTION_LOST");
    assert_ne!(failure["metadata"]["grant_id"], Value::Null);
    assert_eq!(calls, [grant(false)]);
}

fn seen(states: &[VolumeState]) -> Manners {
    Manners { states: states.iter().copied().map(volume).collect(), ..Manners::default() }
}

#[test]
fn waiting_returns_once_the_volume_is_local() {
    let b = seen(&[VolumeState::Hydrating, VolumeState::Collapsing, VolumeState::Local]);
    let (ran, _) = move_volume(Manners::default(), b, &["--wait", "--output=json"]);
    assert_eq!(ran.json()["state"], "local");
    assert_eq!(ran.err, "");
}

#[test]
fn waiting_for_a_held_move_returns_once_it_is_held() {
    let (ran, _) =
        move_volume(Manners::default(), Manners::default(), &["--hold", "--wait", "--output=json"]);
    assert_eq!(ran.json()["state"], "held");
}

#[test]
fn waiting_ends_with_a_failure_when_the_volume_fails() {
    let mut b = seen(&[VolumeState::Hydrating, VolumeState::Failed]);
    b.states[1].detail = "the metadata is read-only".into();
    let (ran, _) = move_volume(Manners::default(), b, &["--wait"]);
    assert_eq!((ran.code, ran.out), (Some(1), format!("{DEVICE}\n")));
    assert!(ran.err.contains("the metadata is read-only (VOLUME_FAILED)"), "{}", ran.err);
}
