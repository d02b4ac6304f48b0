use std::os::unix::fs::symlink;

use super::*;

const NQN: &str = "nqn.2014-08.org.nvmexpress:uuid:6f6a3b5e-0000-4000-8000-000000000001";
const OTHER: &str = "nqn.2014-08.org.nvmexpress:uuid:6f6a3b5e-0000-4000-8000-000000000002";

fn uuid(last: u8) -> Uuid {
    format!("6f6a3b5e-0000-4000-8000-0000000001{last:02x}").parse().unwrap()
}

fn import() -> Import {
    Import {
        nqn: NQN.to_owned(),
        uuid: uuid(1),
        address: "192.0.2.1".parse().unwrap(),
        port: 4420,
        host_nqn: "nqn.2014-08.org.nvmexpress:uuid:host".to_owned(),
        host_id: uuid(9),
    }
}

/// A sysfs with the directories and links that the kernel makes.
struct Sys(tempfile::TempDir);

impl Sys {
    fn new() -> Self {
        let sys = Self(tempfile::tempdir().unwrap());
        fs::create_dir_all(sys.0.path().join("class/nvme")).unwrap();
        fs::create_dir_all(sys.0.path().join("class/nvme-subsystem")).unwrap();
        sys
    }

    fn put(&self, path: &str, text: &str) -> &Self {
        let path = self.0.path().join(path);
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        fs::write(path, format!("{text}\n")).unwrap();
        self
    }

    fn controller(&self, name: &str, nqn: &str, state: &str) -> &Self {
        self.put(&format!("devices/fabrics/{name}/subsysnqn"), nqn);
        self.put(&format!("devices/fabrics/{name}/state"), state);
        self.put(&format!("devices/fabrics/{name}/delete_controller"), "");
        let target = format!("../../devices/fabrics/{name}");
        symlink(target, self.0.path().join("class/nvme").join(name)).unwrap();
        self
    }

    fn subsystem(&self, name: &str, nqn: &str) -> &Self {
        self.put(&format!("devices/subsystems/{name}/subsysnqn"), nqn);
        let target = format!("../../devices/subsystems/{name}");
        symlink(target, self.0.path().join("class/nvme-subsystem").join(name)).unwrap();
        self
    }

    fn namespace(&self, parent: &str, name: &str, uuid: Uuid, dev: Option<&str>) -> &Self {
        self.put(&format!("devices/{parent}/{name}/uuid"), &uuid.to_string());
        if let Some(dev) = dev {
            self.put(&format!("devices/{parent}/{name}/dev"), dev);
        }
        self
    }

    fn observe(&self) -> Seen {
        observe_in(self.0.path(), &import()).unwrap()
    }
}

#[test]
fn nothing_is_seen_where_there_is_nothing() {
    assert_eq!(Sys::new().observe(), Seen::default());
    let empty = tempfile::tempdir().unwrap();
    assert_eq!(observe_in(empty.path(), &import()).unwrap(), Seen::default());
}

#[test]
fn with_multipath_the_head_is_found_and_not_the_hidden_path() {
    let sys = Sys::new();
    sys.controller("nvme0", OTHER, "live")
        .controller("nvme1", NQN, "live")
        .subsystem("nvme-subsys0", OTHER)
        .subsystem("nvme-subsys1", NQN)
        .namespace("fabrics/nvme1", "nvme1c1n1", uuid(1), None)
        // The same UUID in a foreign subsystem is a foreign namespace.
        .namespace("subsystems/nvme-subsys0", "nvme0n1", uuid(1), Some("259:0"))
        .namespace("subsystems/nvme-subsys1", "nvme1n1", uuid(1), Some("259:3"));
    let seen = sys.observe();
    assert_eq!(seen.namespace, Some(DevNo { major: 259, minor: 3 }));
    assert_eq!(seen.namespace_name.as_deref(), Some("nvme1n1"));
    assert!(seen.live);
    assert_eq!(seen.controllers.len(), 1);
}

#[test]
fn without_multipath_the_controllers_namespace_is_found() {
    let sys = Sys::new();
    sys.controller("nvme0", NQN, "live")
        .namespace("fabrics/nvme0", "nvme0n1", uuid(1), Some("259:0"))
        .put("devices/fabrics/nvme0/nvme0n1/nvme0n1p1/dev", "259:1");
    assert_eq!(sys.observe().namespace, Some(DevNo { major: 259, minor: 0 }));
}

#[test]
fn a_name_that_was_given_to_another_namespace_is_not_taken() {
    let sys = Sys::new();
    sys.controller("nvme0", NQN, "live").subsystem("nvme-subsys0", NQN).namespace(
        "subsystems/nvme-subsys0",
        "nvme0n1",
        uuid(2),
        Some("259:0"),
    );
    let seen = sys.observe();
    assert_eq!(seen.namespace, None);
    assert!(seen.live);
}

#[test]
fn of_two_controllers_one_live_one_is_enough() {
    let sys = Sys::new();
    sys.controller("nvme0", NQN, "connecting").controller("nvme3", NQN, "live");
    let seen = sys.observe();
    let states: Vec<_> =
        seen.controllers.iter().map(|one| (one.name.as_str(), one.state.as_str())).collect();
    assert_eq!(states, [("nvme0", "connecting"), ("nvme3", "live")]);
    assert!(seen.live);
    let sys = Sys::new();
    sys.controller("nvme0", NQN, "connecting").controller("nvme3", NQN, "deleting");
    assert!(!sys.observe().live);
}

#[test]
fn only_the_subsystems_own_controllers_are_deleted() {
    let sys = Sys::new();
    sys.controller("nvme0", NQN, "live").controller("nvme1", OTHER, "live").controller(
        "nvme2",
        NQN,
        "connecting",
    );
    // Nothing here deletes them, so waiting for their end times out.
    let error = disconnect_in(sys.0.path(), NQN, Duration::from_millis(50)).unwrap_err();
    assert_eq!(error.kind(), io::ErrorKind::TimedOut);
    let written = |name: &str| {
        let path = sys.0.path().join("class/nvme").join(name).join("delete_controller");
        fs::read_to_string(path).unwrap()
    };
    assert_eq!(
        ["nvme0", "nvme1", "nvme2"].map(|name| written(name).trim() == "1"),
        [true, false, true]
    );
}

#[test]
fn disconnecting_what_is_not_connected_is_success() {
    disconnect_in(Sys::new().0.path(), NQN, Duration::ZERO).unwrap();
}

#[test]
fn only_whole_visible_namespaces_count() {
    for (name, is) in [
        ("nvme0n1", true),
        ("nvme12n345", true),
        ("nvme0c0n1", false),
        ("nvme0n1p1", false),
        ("nvme0", false),
        ("nvmen", false),
        ("ng0n1", false),
        ("hwmon0", false),
    ] {
        assert_eq!(is_namespace(name), is, "{name}");
    }
}

#[test]
fn a_peer_cannot_add_options() {
    let text = options(&import()).unwrap();
    assert!(text.starts_with("transport=tcp,traddr=192.0.2.1,trsvcid=4420,nqn=nqn.2014"));
    assert!(text.contains(",ctrl_loss_tmo=-1,"), "{text}");
    for hostile in ["", "nqn,ctrl_loss_tmo=0", "a b", "a\nb"] {
        assert!(options(&Import { nqn: hostile.to_owned(), ..import() }).is_err());
        assert!(options(&Import { host_nqn: hostile.to_owned(), ..import() }).is_err());
    }
}
