//! `status --watch` where no terminal is: a line per change, and a clean end.

use std::{
    fs::File,
    io::{BufRead as _, BufReader},
    process::{Child, ChildStdout, Stdio},
    thread,
    time::{Duration, Instant},
};

use crate::agent::{ID, Log, Manners, OTHER, dmlocalctl, run, unix, volume};
use dmlocal_proto::v1::{VolumeState, WatchResponse};
use rustix::{
    process::{Pid, Signal, kill_process},
    pty::{OpenptFlags, grantpt, openpt, ptsname, unlockpt},
    termios::{Winsize, tcsetwinsize},
};
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
fn on_a_terminal_the_table_is_drawn_over_itself() {
    let mut hydrating = volume(VolumeState::Hydrating);
    hydrating.percent = Some(50.0);
    let changes = vec![
        WatchResponse { volume: Some(hydrating), gone: false },
        change(VolumeState::Local, false),
        change(VolumeState::Local, true),
    ];
    let (_dir, endpoint) = agent(changes);
    let terminal = openpt(OpenptFlags::RDWR | OpenptFlags::NOCTTY).unwrap();
    grantpt(&terminal).unwrap();
    unlockpt(&terminal).unwrap();
    let name = ptsname(&terminal, Vec::new()).unwrap();
    let stdout = File::options().write(true).open(name.to_str().unwrap()).unwrap();
    let size = Winsize { ws_row: 24, ws_col: 100, ws_xpixel: 0, ws_ypixel: 0 };
    tcsetwinsize(&stdout, size).unwrap();
    let child = dmlocalctl()
        .args(["--endpoint", &endpoint, "status", ID, "--watch"])
        .stdout(stdout)
        .spawn()
        .unwrap();
    assert_ends_well(child);
    let mut shown = vec![0; 65_536];
    let length = rustix::io::read(&terminal, &mut shown).unwrap();
    let shown = String::from_utf8_lossy(&shown[..length]).into_owned();
    let drawings: Vec<_> = shown.split("\x1b[J").collect();
    assert_eq!(drawings.len(), 4, "{shown:?}");
    assert!(drawings[1].contains("[##########----------]  50.0%"), "{shown:?}");
    // Head and volume: two lines to go up.
    assert!(drawings[1].ends_with("\x1b[2A\r"), "{shown:?}");
    assert!(drawings[2].contains(" local ") && drawings[2].ends_with("\x1b[2A\r"), "{shown:?}");
    assert_eq!(drawings[3].lines().count(), 1, "{shown:?}");
    assert!(shown.lines().all(|line| line.chars().count() <= 120), "{shown:?}");
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
