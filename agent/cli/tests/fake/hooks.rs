//! libvirt's hook, called as libvirt documents it.

use std::{
    io::Write as _,
    process::Stdio,
    thread,
    time::{Duration, Instant},
};

use tempfile::tempdir;

use crate::agent::{DEVICE, ID, Log, Manners, OTHER, Ran, dmlocalctl, unix};

/// Longest that libvirt may be kept waiting.
const BOUND: Duration = Duration::from_secs(20);

/// A guest with a volume, one that the agent does not know, and a file.
fn domain() -> String {
    format!(
        "<domain type='kvm'><name>instance-00000001</name><devices>
           <disk type='block' device='disk'>
             <driver name='qemu' type='raw' cache='none' io='native'/>
             <source dev='/dev/mapper/dmlocal-{OTHER}'/><target dev='vdb' bus='virtio'/>
           </disk>
           <disk type='block' device='disk'>
             <source dev='{DEVICE}' index='1'/><target dev='vda' bus='virtio'/>
           </disk>
           <disk type='file' device='cdrom'><source file='/iso'/></disk>
         </devices></domain>"
    )
}

fn hook(endpoint: &str, words: &[&str], xml: &[u8]) -> Ran {
    let mut command = dmlocalctl();
    command.args(["--endpoint", endpoint, "hook", "libvirt"]).args(words);
    let mut child = command
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    let (mut stdin, xml) = (child.stdin.take().unwrap(), xml.to_vec());
    // It may end before it has read everything.
    let feeding = thread::spawn(move || drop(stdin.write_all(&xml)));
    let ran = child.wait_with_output().unwrap().into();
    feeding.join().unwrap();
    ran
}

/// Ended well, and printed nothing: libvirt takes what a filter prints for XML.
#[track_caller]
fn is_harmless(ran: &Ran) {
    assert_eq!((ran.code, ran.out.as_str()), (Some(0), ""), "{ran:?}");
}

#[test]
fn only_a_guest_that_has_been_migrated_away_is_told_of() {
    let (dir, log) = (tempdir().unwrap(), Log::default());
    let fake = unix(dir.path(), "node-a", &log, Manners::default());
    let xml = domain();
    // At the destination of a migration, as libvirt documents it; then everything
    // else that may come, old releases' `-` among it.
    for words in [
        ["migrate", "begin", "-"],
        ["prepare", "begin", "-"],
        ["start", "begin", "-"],
        ["started", "begin", "-"],
        ["reconnect", "begin", "-"],
        ["attach", "begin", "-"],
        ["restore", "begin", "-"],
        ["stopped", "end", "-"],
        ["release", "end", "-"],
        ["release", "end", "shutdown"],
        ["release", "end", "destroyed"],
        ["release", "end", "failed"],
        ["release", "begin", "migrated"],
        ["started", "begin", "migrated"],
    ] {
        let ran =
            hook(&fake.endpoint, &[&["instance-00000001"], &words[..]].concat(), xml.as_bytes());
        is_harmless(&ran);
        assert_eq!(ran.err, "", "{words:?}");
    }
    assert_eq!(*log.lock().unwrap(), [""; 0]);
    // At the source; twice, because hooks may.
    for _ in 0..2 {
        let words = ["instance-00000001", "release", "end", "migrated"];
        let ran = hook(&fake.endpoint, &words, xml.as_bytes());
        is_harmless(&ran);
        assert!(ran.err.contains(OTHER) && !ran.err.contains(ID), "{ran:?}");
    }
    let told = [OTHER, ID].map(|id| format!("node-a GuestLeft {id}"));
    assert_eq!(*log.lock().unwrap(), [&told[..], &told[..]].concat());
}

#[test]
fn whatever_goes_wrong_libvirt_goes_on() {
    let dir = tempdir().unwrap();
    let nobody = format!("unix://{}/nobody", dir.path().display());
    let words = ["-guest", "release", "end", "migrated"];
    let long = vec![b'<'; 5 << 20];
    let domain = domain();
    for xml in [&b"<domain><devices>"[..], b"\xff", &long, domain.as_bytes()] {
        let ran = hook(&nobody, &words, xml);
        is_harmless(&ran);
        assert!(ran.err.contains("-guest: "), "nobody is told of it: {ran:?}");
    }
    // A later libvirt may say more.
    is_harmless(&hook(&nobody, &["vm", "later", "-", "-", "more"], b""));
    let ran = hook(&nobody, &["vm", "release"], b"");
    assert_eq!(ran.code, Some(2), "a wrong command line: {ran:?}");
}

#[test]
fn libvirt_does_not_wait_for_ever() {
    let (dir, log) = (tempdir().unwrap(), Log::default());
    let fake = unix(dir.path(), "node-a", &log, Manners::default());
    let mut command = dmlocalctl();
    let begun = Instant::now();
    let mut child = command
        .args(["--endpoint", &fake.endpoint, "hook", "libvirt", "vm", "release", "end", "migrated"])
        .stdin(Stdio::piped())
        .spawn()
        .unwrap();
    // It stays open and silent: waiting would close it.
    let _silent = child.stdin.take().unwrap();
    let status = child.wait().unwrap();
    assert!(status.success() && begun.elapsed() < BOUND, "{status} after {:?}", begun.elapsed());
}
