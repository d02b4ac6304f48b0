//! `status --watch` where no terminal is: a line per change, and a clean end.

use std::{
    io::{BufRead as _, BufReader},
    process::{Child, ChildStdout, Stdio},
    thread,
    time::{Duration, Instant},
};

use crate::agent::{ID, Log, Manners, OTHER, dmlocalctl, run, unix, volume};
use dmlocal_proto::v1::{VolumeState, WatchResponse};
use rustix::process::{Pid, Signal, kill_process};
use serde_json::Value;
use tempfile::{TempDir, tempdir};

fn change(state: VolumeState, gone: bool) -> WatchResponse {
    WatchResponse { volume: Some(volume(state)), gone }
}

fn agent(changes: Vec<WatchResponse>) -> (TempDir, String) {
    let dir = tempdir().unwrap();
    let fake =
        unix(dir.path(), "node-a", &Log::default(), Manners { changes, ..Manners::default() });
    (dir, fake.endpoint)
}

fn watch(endpoint: &str, args: &[&str]) -> (Child, BufReader<ChildStdout>) {
    let mut child = dmlocalctl()
        .args(["--endpoint", endpoint, "status", "--watch"])
        .args(args)
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    let out = BufReader::new(child.stdout.take().unwrap());
    (child, out)
}

#[track_caller]
fn assert_ends_well(mut child: Child) {
    let begin = Instant::now();
    while begin.elapsed() < Duration::from_secs(20) {
        if let Some(status) = child.try_wait().unwrap() {
            assert_eq!(status.code(), Some(0));
            return;
        }
        thread::sleep(Duration::from_millis(20));
    }
    child.kill().unwrap();
    panic!("it goes on");
}

#[test]
fn each_change_is_a_line_of_json() {
    let (_dir, endpoint) =
        agent(vec![change(VolumeState::Hydrating, false), change(VolumeState::Local, false)]);
    let (child, out) = watch(&endpoint, &["--output", "json"]);
    let lines: Vec<Value> =
        out.lines().take(2).map(|line| serde_json::from_str(&line.unwrap()).unwrap()).collect();
    assert_eq!((&lines[0]["state"], &lines[1]["state"]), (&"hydrating".into(), &"local".into()));
    assert_eq!(lines[0]["gone"], false);
    // Reading has stopped, which a quiet watch must notice by itself.
    assert_ends_well(child);
}

#[test]
fn each_change_is_a_line_for_people() {
    let (_dir, endpoint) = agent(vec![change(VolumeState::Hydrating, false)]);
    let (child, mut out) = watch(&endpoint, &[]);
    let mut line = String::new();
    out.read_line(&mut line).unwrap();
    assert!(line.starts_with(&format!("{ID}  64MiB ")) && line.contains(" hydrating "), "{line:?}");
    kill_process(Pid::from_child(&child), Signal::INT).unwrap();
    assert_ends_well(child);
}

#[test]
fn watching_one_volume_ends_when_it_has_left_the_node() {
    let (_dir, endpoint) =
        agent(vec![change(VolumeState::Fenced, false), change(VolumeState::Releasing, true)]);
    let ran = run(&endpoint, &["status", ID, "--watch", "--output", "json"]);
    assert_eq!(ran.code, Some(0), "{ran:?}");
    let last: Value = serde_json::from_str(ran.out.lines().last().unwrap()).unwrap();
    assert_eq!((&last["id"], &last["gone"]), (&ID.into(), &true.into()));
}

#[test]
fn watching_an_unknown_volume_is_refused() {
    let (_dir, endpoint) = agent(Vec::new());
    let failure = run(&endpoint, &["status", OTHER, "--watch", "--output", "json"]).failure();
    assert_eq!(failure["reason"], "VOLUME_NOT_FOUND");
}
