//! What each command asks the agent for, prints and exits with.

use std::{fs, path::Path};

use crate::agent::{DEVICE, ID, Log, Manners, OTHER, Ran, dmlocalctl, run, unix, volume};
use dmlocal_proto::v1::{Volume, VolumeState};
use serde_json::Value;
use tempfile::{TempDir, tempdir};

fn agent(manners: Manners) -> (TempDir, Log, String) {
    let dir = tempdir().unwrap();
    let log = Log::default();
    let fake = unix(dir.path(), "node-a", &log, manners);
    (dir, log, fake.endpoint)
}

#[test]
fn status_in_json_is_an_array_of_volumes_with_the_contracts_keys() {
    let (_dir, _log, endpoint) = agent(Manners::default());
    let all = run(&endpoint, &["status", "--output", "json"]).json();
    assert_eq!(all.as_array().unwrap().len(), 2);
    let one = run(&endpoint, &["--output", "json", "status", ID]).json();
    let one = &one.as_array().unwrap()[0];
    let keys = [
        "id",
        "size_bytes",
        "state",
        "attached",
        "device_path",
        "percent",
        "bytes_left",
        "rate_bytes_per_s",
        "eta_s",
        "source_node",
        "generation",
    ];
    for key in keys {
        assert!(one.get(key).is_some(), "{key}");
    }
    assert_eq!(one["id"], ID);
    assert_eq!(one["size_bytes"], 67_108_864);
    assert_eq!(one["state"], "local");
    assert_eq!(one["attached"], true);
    assert_eq!(one["percent"], Value::Null);
    assert_eq!(one["generation"], 1);
}

#[test]
fn status_for_people_is_a_table() {
    let (_dir, _log, endpoint) = agent(Manners::default());
    let ran = run(&endpoint, &["status"]);
    let mut lines = ran.out.lines();
    assert!(lines.next().unwrap().starts_with("ID    "), "{ran:?}");
    assert!(
        lines.next().unwrap().starts_with(&format!("{ID}  64MiB  -          local ")),
        "{ran:?}"
    );
}

#[test]
fn every_command_asks_for_what_it_was_told() {
    let (_dir, log, endpoint) = agent(Manners::default());
    let table: &[(&[&str], String, &str)] = &[
        (
            &["volume", "create", ID, "--size", "64MiB"],
            format!("Create {ID} 67108864 "),
            &format!("{ID}\n"),
        ),
        (
            &["volume", "create", ID, "--size=512", "--pool", "fast"],
            format!("Create {ID} 512 fast"),
            &format!("{ID}\n"),
        ),
        (&["volume", "attach", ID], format!("Attach {ID} None"), &format!("{DEVICE}\n")),
        (
            &["volume", "attach", ID, "--generation", "3"],
            format!("Attach {ID} Some(3)"),
            &format!("{DEVICE}\n"),
        ),
        (&["volume", "detach", ID], format!("Detach {ID}"), ""),
        (&["volume", "delete", ID], format!("Delete {ID}"), ""),
        (&["volume", "delete", OTHER], format!("Delete {OTHER}"), ""),
        (&["volume", "abort", ID], format!("Abort {ID}"), ""),
        (&["volume", "extend", ID, "--size", "1GiB"], format!("Extend {ID} 1073741824"), "ID"),
        (&["volume", "switch", ID], format!("Switch {ID}"), "ID"),
        (
            &["volume", "forget-source", ID, "--i-accept-data-loss"],
            format!("ForgetSource {ID} true"),
            "lost: 3MiB (3145728 bytes) in 48 regions\n",
        ),
        (&["volume", "switch", ID, "--force"], format!("Switch {ID} by force"), "ID"),
        (
            &["volume", "create", OTHER, "--from-volume", ID, "--pool", "fast"],
            format!("Create {OTHER} 0 fast of volume {ID}"),
            &format!("{OTHER}\n"),
        ),
        (
            &["volume", "create", ID, "--from-snapshot", OTHER],
            format!("Create {ID} 0  of snapshot {OTHER}"),
            &format!("{ID}\n"),
        ),
        (
            &["volume", "revert", ID, "--snapshot", OTHER, "--generation", "3"],
            format!("Revert {ID} {OTHER} Some(3)"),
            "ID",
        ),
        (
            &["snapshot", "create", OTHER, "--volume", ID],
            format!("Snapshot {OTHER} of {ID}"),
            &format!("{OTHER}\n"),
        ),
        (&["snapshot", "delete", OTHER], format!("DeleteSnapshot {OTHER} false None"), ""),
        (
            &["snapshot", "delete", OTHER, "--defer"],
            format!("DeleteSnapshot {OTHER} true None"),
            "",
        ),
        (&["volume", "localize", ID], format!("Localize {ID} \"\""), "ID"),
        (&["volume", "localize", ID, "--pool", "fast"], format!("Localize {ID} \"fast\""), "ID"),
        (&["hydration", "pause", ID], format!("Pause {ID}"), "ID"),
        (&["hydration", "resume", ID], format!("Resume {ID}"), "ID"),
        (
            &["hydration", "set", ID, "--rate", "10MiB"],
            format!("Tune {ID} Some(10485760) None None None"),
            "ID",
        ),
        (
            &["hydration", "set", ID, "--threshold", "4", "--batch", "8"],
            format!("Tune {ID} None Some(4) Some(8) None"),
            "ID",
        ),
        (
            &["hydration", "set", ID, "--priority", "-5"],
            format!("Tune {ID} None None None Some(-5)"),
            "ID",
        ),
    ];
    for (args, call, out) in table {
        log.lock().unwrap().clear();
        let ran = run(&endpoint, args);
        assert_eq!(ran.code, Some(0), "{ran:?}");
        assert_eq!(*log.lock().unwrap(), [format!("node-a {call}")], "{args:?}");
        match *out {
            "ID" => assert!(ran.out.starts_with("ID "), "{args:?} printed {ran:?}"),
            exact => assert_eq!(ran.out, exact, "{args:?}"),
        }
        assert_eq!(ran.err, "", "{args:?}");
    }
}

#[test]
fn a_volume_is_taken_back_from_the_node_that_is_named() {
    let lent = Volume {
        peer_node: Some("node-z".into()),
        grant_id: Some(OTHER.into()),
        generation: 4,
        ..volume(VolumeState::Fenced)
    };
    let states = [lent.clone(), lent, volume(VolumeState::Local)];
    let (_dir, log, endpoint) = agent(Manners { states: states.into(), ..Manners::default() });
    let reclaim = ["volume", "reclaim", ID, "--output", "json", "--from"];
    let refused = run(&endpoint, &[&reclaim[..], &["node-y"]].concat());
    assert_eq!(refused.failure()["reason"], "GRANT_UNKNOWN");
    assert_eq!(*log.lock().unwrap(), [""; 0]);
    let taken = run(&endpoint, &[&reclaim[..], &["node-z"]].concat());
    assert_eq!(taken.json()["state"], "local");
    let again = run(&endpoint, &[&reclaim[..], &["node-z"]].concat());
    assert_eq!(again.json()["state"], "local");
    assert_eq!(*log.lock().unwrap(), [format!("node-a Reclaim {ID} {OTHER} 4")]);
}

#[test]
fn in_json_every_command_prints_one_value() {
    let (_dir, _log, endpoint) = agent(Manners::default());
    let json = |args: &[&str]| run(&endpoint, &[args, &["--output", "json"]].concat()).json();
    assert_eq!(json(&["volume", "create", ID, "--size", "512"])["size_bytes"], 512);
    assert_eq!(json(&["volume", "attach", ID])["device_path"], DEVICE);
    assert_eq!(json(&["volume", "detach", ID])["id"], ID);
    assert_eq!(json(&["volume", "show", ID])["pool"], "fast");
    assert_eq!(json(&["volume", "extend", ID, "--size", "1GiB"])["id"], ID);
    assert_eq!(json(&["volume", "switch", ID])["id"], ID);
    let forgotten = json(&["volume", "forget-source", ID, "--i-accept-data-loss"]);
    assert_eq!((&forgotten["regions_lost"], &forgotten["volume"]["id"]), (&48.into(), &ID.into()));
    assert_eq!(json(&["hydration", "pause", ID])["id"], ID);
    assert_eq!(json(&["volume", "list"]).as_array().unwrap().len(), 2);
    assert_eq!(json(&["pool", "list"])[0]["name"], "fast");
    assert_eq!(json(&["node", "show"])["targets"][0], "clone 1.0.1");
    assert_eq!(json(&["volume", "delete", ID]), serde_json::json!({}));
    assert_eq!(json(&["volume", "abort", ID]), serde_json::json!({}));
}

#[test]
fn people_see_warnings_of_the_node_and_all_fields_of_a_volume() {
    let (_dir, _log, endpoint) = agent(Manners::default());
    assert!(run(&endpoint, &["node", "show"]).out.contains("\nwarning: a warning\n"));
    assert!(run(&endpoint, &["volume", "show", ID]).out.contains(DEVICE));
    assert!(run(&endpoint, &["pool", "list"]).out.starts_with("POOL "));
}

#[test]
fn an_agents_refusal_exits_1_with_its_own_reason_and_metadata() {
    let (_dir, _log, endpoint) = agent(Manners::default());
    let failure = run(&endpoint, &["--output", "json", "status", OTHER]).failure();
    let wanted = serde_json::json!({
        "reason": "VOLUME_NOT_FOUND", "message": "volume not found", "metadata": {"volume": ID}
    });
    assert_eq!(failure, wanted);
    let ran = run(&endpoint, &["volume", "show", OTHER]);
    assert_eq!((ran.code, ran.out.as_str()), (Some(1), ""));
    assert_eq!(ran.err, "error: volume not found (VOLUME_NOT_FOUND)\n");
}

#[test]
fn an_id_that_is_no_lower_case_uuid_exits_1_before_anything_is_asked() {
    let (_dir, log, endpoint) = agent(Manners::default());
    let upper = ID.to_uppercase();
    let bare = ID.replace('-', "");
    let braced = format!("{{{ID}}}");
    for id in ["", "x", &upper, &bare, &braced, &format!("urn:uuid:{ID}"), &format!("{ID} ")] {
        let commands: [&[&str]; 13] = [
            &["status", id],
            &["status", "--watch", id],
            &["volume", "create", id, "--size", "1"],
            &["volume", "show", id],
            &["volume", "delete", id],
            &["volume", "extend", id, "--size", "1"],
            &["volume", "attach", id],
            &["volume", "detach", id],
            &["volume", "switch", id],
            &["volume", "localize", id],
            &["volume", "abort", id],
            &["hydration", "pause", id],
            &["volume", "move", id, "--from", &endpoint, "--to", &endpoint],
        ];
        for command in commands {
            let failure = run(&endpoint, &[command, &["--output", "json"]].concat()).failure();
            assert_eq!(failure["reason"], "ID_INVALID", "{command:?}");
        }
    }
    assert_eq!(*log.lock().unwrap(), [] as [&str; 0]);
}

#[test]
fn a_wrong_command_line_exits_2() {
    let table: &[&[&str]] = &[
        &[],
        &["nonsense"],
        &["volume"],
        &["volume", "create", ID],
        &["volume", "create", ID, "--size", "1.5GiB"],
        &["volume", "create", ID, "--size", "16777216TiB"],
        &["volume", "create", ID, "--size", ""],
        &["volume", "extend", ID, "--size", "-1"],
        &["volume", "move", ID, "--from", "unix:///a"],
        &["volume", "move", ID, "--from", "unix:///a", "--to", "unix:///b", "--remote", "--local"],
        &[
            "volume",
            "move",
            ID,
            "--from",
            "unix:///a",
            "--to",
            "unix:///b",
            "--remote",
            "--pool",
            "x",
        ],
        &["volume", "move", ID, "--from", "http://a:1", "--to", "unix:///b"],
        &["volume", "forget-source", ID],
        &["volume", "reclaim", ID],
        &["hydration", "set", ID],
        &["hydration", "set", ID, "--threshold", "x"],
        &["status", "--endpoint", "http://a:1"],
        &["status", "--output", "yaml"],
        &["status", "--timeout", "0"],
        &["status", ID, OTHER],
        &["volume", "delete", ID, "--generation", "x"],
        &["pki", "issue", "--role", "agent", "--out", "d"],
        &["pki", "issue", "--role", "king", "--out", "d"],
        &["pki", "issue", "--role", "agent", "--node", "a b", "--out", "d"],
        &["completions", "cobol"],
    ];
    let dir = tempdir().unwrap();
    for args in table {
        let ran: Ran = dmlocalctl().current_dir(&dir).args(*args).output().unwrap().into();
        assert_eq!((ran.code, ran.out.as_str()), (Some(2), ""), "{args:?}: {ran:?}");
        assert_ne!(ran.err, "", "{args:?}");
    }
    let ran: Ran =
        dmlocalctl().args(["--output=json", "volume", "create", ID]).output().unwrap().into();
    assert_eq!(ran.code, Some(2));
    let failure: Value = serde_json::from_str(&ran.err).unwrap();
    assert_eq!(failure["reason"], "USAGE");
    assert!(failure["metadata"].is_object());
    assert_eq!(fs::read_dir(&dir).unwrap().count(), 0);
}

#[test]
fn help_and_version_exit_0() {
    for args in [["--help"], ["--version"], ["help"]] {
        let ran: Ran = dmlocalctl().args(args).output().unwrap().into();
        assert_eq!((ran.code, ran.err.as_str()), (Some(0), ""), "{ran:?}");
    }
}

#[test]
fn global_flags_stand_before_or_after_the_command_or_in_the_environment() {
    let (_dir, _log, endpoint) = agent(Manners::default());
    let before = run(&endpoint, &["status"]);
    let after: Ran =
        dmlocalctl().args(["status", "--endpoint", &endpoint]).output().unwrap().into();
    let around: Ran =
        dmlocalctl().env("DMLOCAL_ENDPOINT", &endpoint).arg("status").output().unwrap().into();
    assert_eq!(before.code, Some(0), "{before:?}");
    assert_eq!((&after.out, &around.out), (&before.out, &before.out));
    let nested: Ran = dmlocalctl()
        .args(["volume", "--endpoint", &endpoint, "list", "--output", "json"])
        .output()
        .unwrap()
        .into();
    assert!(nested.json().is_array());
}

#[test]
fn an_endpoint_without_an_agent_is_unreachable() {
    let failure = run("unix:///nowhere/agent.sock", &["--output", "json", "status"]).failure();
    assert_eq!(failure["reason"], "ENDPOINT_UNREACHABLE");
    assert_eq!(failure["metadata"]["endpoint"], "unix:///nowhere/agent.sock");
}

#[test]
fn something_that_is_no_agent_is_reported_by_its_code() {
    let manners = Manners {
        grant: crate::agent::Treat::RefuseBare(tonic::Code::Unimplemented),
        ..Manners::default()
    };
    let dir = tempdir().unwrap();
    let log = Log::default();
    let a = unix(dir.path(), "a", &log, manners);
    let b = unix(dir.path(), "b", &log, Manners::default());
    let args = ["volume", "move", ID, "--from", &a.endpoint, "--to", &b.endpoint, "--output=json"];
    let failure = run("unix:///unused", &args).failure();
    assert_eq!(failure["reason"], "ANSWER_WITHOUT_REASON");
    assert_eq!(failure["metadata"]["code"], "Unimplemented");
}

#[test]
fn completions_and_manual_pages_know_every_command() {
    for shell in ["bash", "zsh", "fish"] {
        let ran: Ran = dmlocalctl().args(["completions", shell]).output().unwrap().into();
        assert_eq!(ran.code, Some(0));
        assert!(ran.out.contains("hydration"), "{shell}");
    }
    let dir = tempdir().unwrap();
    let pages = dir.path().join("man1");
    let ran: Ran = dmlocalctl().arg("man").arg(&pages).output().unwrap().into();
    assert_eq!(ran.code, Some(0), "{ran:?}");
    for page in ["dmlocalctl.1", "dmlocalctl-volume-move.1", "dmlocalctl-hydration-set.1"] {
        assert!(Path::new(&pages).join(page).is_file(), "{page}");
    }
}

#[test]
fn output_that_nobody_reads_is_no_failure() {
    let (_dir, _log, endpoint) =
        agent(Manners { states: vec![volume(VolumeState::Local)], ..Manners::default() });
    let (reader, writer) = std::io::pipe().unwrap();
    drop(reader);
    let mut command = dmlocalctl();
    command.args(["--endpoint", &endpoint, "status"]).stdout(writer);
    let ran: Ran = command
        .stderr(std::process::Stdio::piped())
        .spawn()
        .unwrap()
        .wait_with_output()
        .unwrap()
        .into();
    assert_eq!((ran.code, ran.err.as_str()), (Some(0), ""));
}
