use std::{
    collections::BTreeMap,
    sync::{Arc, Mutex},
};

use nix::errno::Errno;

use super::*;

enum Node {
    Directory,
    File(String),
    Link(PathBuf),
}

/// What nvmet's configfs does, as far as it matters here: directories come
/// with their attributes and groups, live things refuse changes, the removal
/// of what is used fails. Every change is recorded; one may be made to fail.
#[derive(Default)]
struct Kernel {
    nodes: BTreeMap<PathBuf, Node>,
    log: Vec<String>,
    left: Option<usize>,
}

impl Kernel {
    fn add(&mut self, path: PathBuf, node: Node) {
        self.nodes.insert(path, node);
    }

    fn children(&self, path: &Path) -> Vec<&Path> {
        let below = self.nodes.keys().filter(|node| node.parent() == Some(path));
        below.map(PathBuf::as_path).collect()
    }

    fn has_links(&self, path: &Path) -> bool {
        let is_link = |path: &&Path| matches!(self.nodes.get(*path), Some(Node::Link(_)));
        self.children(path).iter().any(is_link)
    }

    fn text(&self, path: PathBuf) -> &str {
        match self.nodes.get(&path) {
            Some(Node::File(text)) => text.trim(),
            _ => "",
        }
    }

    /// Counts a change, or fails it.
    fn change(&mut self, what: String) -> io::Result<()> {
        if self.left == Some(0) {
            return Err(Errno::EINTR.into());
        }
        self.left = self.left.map(|left| left - 1);
        self.log.push(what);
        Ok(())
    }
}

#[derive(Clone, Default)]
struct Fake(Arc<Mutex<Kernel>>);

fn name(path: &Path) -> &str {
    path.file_name().unwrap().to_str().unwrap()
}

fn shown(path: &Path) -> String {
    path.strip_prefix("/r").unwrap().display().to_string()
}

impl Tree for Fake {
    fn read(&self, path: &Path) -> io::Result<String> {
        match self.0.lock().unwrap().nodes.get(path) {
            Some(Node::File(text)) => Ok(text.clone()),
            _ => Err(Errno::ENOENT.into()),
        }
    }

    fn write(&self, path: &Path, text: &str) -> io::Result<()> {
        let mut kernel = self.0.lock().unwrap();
        let parent = path.parent().unwrap();
        if !matches!(kernel.nodes.get(path), Some(Node::File(_))) {
            return Err(Errno::ENOENT.into());
        }
        let file = name(path);
        if file.starts_with("addr_") && kernel.has_links(&parent.join("subsystems")) {
            return Err(Errno::EACCES.into());
        }
        let enabled = kernel.text(parent.join("enable")) == "1";
        if file.starts_with("device_") && enabled {
            return Err(Errno::EBUSY.into());
        }
        if file == "enable" && text == "1" && kernel.text(parent.join("device_path")).is_empty() {
            return Err(Errno::EINVAL.into());
        }
        kernel.change(format!("{}={text}", shown(path)))?;
        // The kernel prints UUIDs in lower case and ends every line.
        kernel.add(path.to_owned(), Node::File(format!("{text}\n")));
        Ok(())
    }

    fn make(&self, path: &Path) -> io::Result<()> {
        let mut kernel = self.0.lock().unwrap();
        if kernel.nodes.contains_key(path) {
            return Err(Errno::EEXIST.into());
        }
        kernel.change(format!("mkdir {}", shown(path)))?;
        kernel.add(path.to_owned(), Node::Directory);
        let (files, groups): (&[(&str, &str)], &[&str]) = match name(path.parent().unwrap()) {
            "subsystems" => (
                &[
                    ("attr_allow_any_host", "1"),
                    ("attr_model", "Linux"),
                    ("attr_serial", "f"),
                    ("attr_cntlid_min", "1"),
                    ("attr_cntlid_max", "65519"),
                ],
                &["namespaces", "allowed_hosts"],
            ),
            "namespaces" => (
                &[
                    ("device_path", ""),
                    ("device_uuid", "11111111-1111-4111-8111-111111111111"),
                    ("device_nguid", "00000000-0000-0000-0000-000000000000"),
                    ("buffered_io", "0"),
                    ("enable", "0"),
                ],
                &[],
            ),
            "ports" => (
                &[
                    ("addr_trtype", ""),
                    ("addr_adrfam", ""),
                    ("addr_traddr", ""),
                    ("addr_trsvcid", ""),
                ],
                &["subsystems"],
            ),
            _ => (&[], &[]),
        };
        for (file, text) in files {
            kernel.add(path.join(file), Node::File((*text).to_owned()));
        }
        for group in groups {
            kernel.add(path.join(group), Node::Directory);
        }
        Ok(())
    }

    fn link(&self, target: &Path, path: &Path) -> io::Result<()> {
        let mut kernel = self.0.lock().unwrap();
        if kernel.nodes.contains_key(path) {
            return Err(Errno::EEXIST.into());
        }
        assert!(kernel.nodes.contains_key(target), "{path:?} leads nowhere");
        kernel.change(format!("link {}", shown(path)))?;
        kernel.add(path.to_owned(), Node::Link(target.to_owned()));
        Ok(())
    }

    fn unlink(&self, path: &Path) -> io::Result<()> {
        let mut kernel = self.0.lock().unwrap();
        if !matches!(kernel.nodes.get(path), Some(Node::Link(_))) {
            return Err(Errno::ENOENT.into());
        }
        kernel.change(format!("unlink {}", shown(path)))?;
        kernel.nodes.remove(path);
        Ok(())
    }

    fn remove(&self, path: &Path) -> io::Result<()> {
        let mut kernel = self.0.lock().unwrap();
        if !matches!(kernel.nodes.get(path), Some(Node::Directory)) {
            return Err(Errno::ENOENT.into());
        }
        let used =
            kernel.nodes.values().any(|node| matches!(node, Node::Link(target) if target == path));
        if used {
            return Err(Errno::EBUSY.into());
        }
        for group in ["namespaces", "allowed_hosts", "subsystems"] {
            if !kernel.children(&path.join(group)).is_empty() {
                return Err(Errno::ENOTEMPTY.into());
            }
        }
        kernel.change(format!("rmdir {}", shown(path)))?;
        kernel.nodes.retain(|node, _| !node.starts_with(path));
        Ok(())
    }

    fn list(&self, path: &Path) -> io::Result<Vec<String>> {
        let kernel = self.0.lock().unwrap();
        match kernel.nodes.get(path) {
            Some(Node::Directory) => {
                Ok(kernel.children(path).into_iter().map(|path| name(path).to_owned()).collect())
            }
            _ => Err(Errno::ENOENT.into()),
        }
    }
}

fn bed() -> (Nvmet, Fake) {
    let fake = Fake::default();
    for directory in ["/r", "/r/subsystems", "/r/hosts", "/r/ports"] {
        fake.0.lock().unwrap().add(PathBuf::from(directory), Node::Directory);
    }
    (Nvmet { root: PathBuf::from("/r"), tree: Box::new(fake.clone()) }, fake)
}

fn nqn(last: u8) -> String {
    format!("{NQN_PREFIX}6f6a3b5e-0000-4000-8000-0000000000{last:02x}")
}

fn export(last: u8) -> Export {
    Export {
        nqn: nqn(last),
        serial: format!("serial{last}"),
        uuid: Uuid::from_u128(0xab00 + u128::from(last)),
        nguid: Uuid::from_u128(0xcd00 + u128::from(last)),
        device: PathBuf::from(format!("/dev/dm-{last}")),
        host_nqn: format!("{NQN_PREFIX}host"),
        address: "192.0.2.1".parse().unwrap(),
        port: 4420 + u16::from(last),
    }
}

fn log(fake: &Fake) -> Vec<String> {
    std::mem::take(&mut fake.0.lock().unwrap().log)
}

#[test]
fn the_port_link_is_made_last_and_removed_first() {
    let (nvmet, fake) = bed();
    nvmet.publish(&export(1)).unwrap();
    let made = log(&fake);
    let port_link = format!("ports/4421/subsystems/{}", nqn(1));
    assert_eq!(made.last().unwrap(), &format!("link {port_link}"));
    let position = |what: &str| made.iter().position(|line| line.contains(what)).unwrap();
    assert!(position("device_uuid=") < position("enable=1"));
    assert!(position("attr_allow_any_host=0") < position("enable=1"));
    assert!(nvmet.observe(&export(1)).unwrap().serves());

    nvmet.unpublish(&export(1)).unwrap();
    assert_eq!(log(&fake)[0], format!("unlink {port_link}"));
    let kernel = fake.0.lock().unwrap();
    assert_eq!(kernel.nodes.len(), 4, "something is left");
}

#[test]
fn repeating_changes_nothing() {
    let (nvmet, fake) = bed();
    nvmet.unpublish(&export(1)).unwrap();
    assert!(log(&fake).is_empty());
    nvmet.publish(&export(1)).unwrap();
    log(&fake);
    nvmet.publish(&export(1)).unwrap();
    assert!(log(&fake).is_empty());
}

#[test]
fn publishing_and_withdrawing_end_from_every_half_made_state() {
    let (nvmet, fake) = bed();
    nvmet.publish(&export(1)).unwrap();
    let steps = log(&fake).len();
    for cut in 0..=steps {
        for then_publish in [true, false] {
            let (nvmet, fake) = bed();
            fake.0.lock().unwrap().left = Some(cut);
            assert_eq!(nvmet.publish(&export(1)).is_ok(), cut == steps);
            fake.0.lock().unwrap().left = None;
            if then_publish {
                nvmet.publish(&export(1)).unwrap();
                assert!(nvmet.observe(&export(1)).unwrap().serves(), "cut at {cut}");
                // Withdrawing is cut off as well, everywhere.
                for cut in 0.. {
                    fake.0.lock().unwrap().left = Some(cut);
                    let done = nvmet.unpublish(&export(1)).is_ok();
                    fake.0.lock().unwrap().left = None;
                    if done {
                        break;
                    }
                }
            } else {
                nvmet.unpublish(&export(1)).unwrap();
            }
            assert_eq!(fake.0.lock().unwrap().nodes.len(), 4, "cut at {cut}");
        }
    }
}

#[test]
fn a_live_export_that_differs_is_taken_down_before_it_is_changed() {
    let (nvmet, fake) = bed();
    nvmet.publish(&export(1)).unwrap();
    log(&fake);
    let changed = Export {
        device: PathBuf::from("/dev/dm-9"),
        host_nqn: format!("{NQN_PREFIX}host2"),
        ..export(1)
    };
    assert!(!nvmet.observe(&changed).unwrap().serves());
    nvmet.publish(&changed).unwrap();
    assert!(log(&fake)[0].starts_with("unlink ports/"));
    assert!(nvmet.observe(&changed).unwrap().serves());
    assert!(!nvmet.observe(&export(1)).unwrap().host_allowed);
}

#[test]
fn two_exports_never_share_a_port_but_may_share_a_host() {
    let (nvmet, _fake) = bed();
    nvmet.publish(&export(1)).unwrap();
    let same_port = Export { port: export(1).port, ..export(2) };
    let error = nvmet.publish(&same_port).unwrap_err();
    assert_eq!(error.kind(), io::ErrorKind::AddrInUse);
    assert!(nvmet.observe(&export(1)).unwrap().serves());

    nvmet.publish(&export(2)).unwrap();
    nvmet.unpublish(&export(1)).unwrap();
    assert!(nvmet.observe(&export(2)).unwrap().serves());
    assert_eq!(nvmet.ours().unwrap(), [nqn(2)]);
}

#[test]
fn foreign_subsystems_are_neither_listed_nor_touched() {
    let (nvmet, fake) = bed();
    for foreign in ["nqn.2020-01.com.example:x".to_owned(), nqn(3)] {
        fake.make(&PathBuf::from("/r/subsystems").join(foreign)).unwrap();
    }
    assert!(nvmet.ours().unwrap().is_empty());
    let error = nvmet.unpublish_by_nqn("nqn.2020-01.com.example:x").unwrap_err();
    assert_eq!(error.kind(), io::ErrorKind::InvalidInput);
}

#[test]
fn names_that_lead_elsewhere_are_refused() {
    for nqn in ["", "x", NQN_PREFIX, &format!("{NQN_PREFIX}../x"), &format!("{NQN_PREFIX}a b")] {
        let (nvmet, fake) = bed();
        assert!(nvmet.publish(&Export { nqn: nqn.to_owned(), ..export(1) }).is_err(), "{nqn}");
        assert!(nvmet.unpublish_by_nqn(nqn).is_err(), "{nqn}");
        assert!(log(&fake).is_empty());
    }
    for host_nqn in ["", "..", "a/b"] {
        let host_nqn = host_nqn.to_owned();
        assert!(bed().0.publish(&Export { host_nqn, ..export(1) }).is_err());
    }
    let serial = "x".repeat(SERIAL_MAX + 1);
    assert!(bed().0.publish(&Export { serial, ..export(1) }).is_err());
}
