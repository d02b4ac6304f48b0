//! What a hypervisor's hooks tell, and what of it may be passed on.
//!
//! ```text
//! libvirt ── GUEST OPERATION SUB-OPERATION EXTRA, domain XML ──► hook ──► the agent
//! ```
//!
//! Hooks lie: `started` comes at the destination before the guest runs there, and
//! whatever was begun may still be given up. One thing is sure: after `release end
//! migrated` the guest's QEMU is gone from this node, and the guest runs elsewhere. The
//! agent is told that, and nothing else; it looks at the handle itself before it makes
//! anything of it. A hook that never comes, comes twice or comes late changes nothing
//! but when things happen.
//!
//! libvirt waits for its hooks, gives up what it was about when one fails, and takes
//! what one prints in `migrate` and `restore` for the guest's new description. So this
//! prints nothing, ends in bounded time, and fails for a wrong command line only.

use std::{
    io::{Read, Write as _, stderr, stdin},
    str,
    sync::mpsc,
    thread,
    time::Duration,
};

use dmlocal_proto::v1::GuestLeftRequest;
use quick_xml::{Reader, XmlVersion, events::Event};
use tokio::time::timeout;

use crate::{
    args::{Global, HookArguments, check_id},
    client::Agent,
};

/// Longest time that libvirt is made to wait for its own description of the guest.
const READING: Duration = Duration::from_secs(2);

/// Longest time that the agent may take for all disks together.
const TELLING: Duration = Duration::from_secs(5);

/// Most that is read of a description, in bytes; real ones have some ten thousand.
const LONGEST: u64 = 4 << 20;

/// Deepest nesting that is followed; a disk's source is at the fourth level.
const DEEPEST: usize = 64;

/// How the path of a handle begins.
const HANDLE: &str = "/dev/mapper/dmlocal-";

/// Passes on what may be concluded. Whatever goes wrong is told to libvirt's log, and
/// is no failure.
pub(crate) async fn libvirt(global: &Global, arguments: &HookArguments) {
    let HookArguments { guest, operation, sub_operation, extra } = arguments;
    let text = read(stdin());
    let reason = extra.first().map(String::as_str);
    // Before libvirt 10.5 the reason is `-`, which says nothing.
    if (operation.as_str(), sub_operation.as_str(), reason) != ("release", "end", Some("migrated"))
    {
        return;
    }
    let disks = match text.as_deref().map(volumes) {
        Some(Ok(disks)) => disks,
        Some(Err(why)) => return complain(guest, &why),
        None => return complain(guest, "its description did not arrive"),
    };
    if disks.is_empty() {
        return;
    }
    let told = async {
        let agent = match Agent::connect(&global.endpoint, global).await {
            Ok(agent) => agent,
            Err(failure) => return complain(guest, &failure.message),
        };
        for id in disks {
            let ask = GuestLeftRequest { id: id.clone() };
            if let Err(error) = agent.ask(agent.moves().guest_left(ask)).await {
                complain(guest, &format!("{id}: {}", error.failure.message));
            }
        }
    };
    if timeout(TELLING, told).await.is_err() {
        complain(guest, "the agent does not answer in time");
    }
}

fn complain(guest: &str, why: &str) {
    // Nobody may be listening.
    let _ = writeln!(stderr(), "dmlocalctl hook: {guest}: {why}");
}

/// What is there to read, within bounds; `None` when it does not end in time.
fn read(from: impl Read + Send + 'static) -> Option<Vec<u8>> {
    let (done, arrived) = mpsc::channel();
    // Left to itself when it is late: the process ends without it.
    thread::spawn(move || {
        let mut text = Vec::new();
        let whole = from.take(LONGEST + 1).read_to_end(&mut text);
        let _ = done.send(whole.map(|_| text));
    });
    arrived.recv_timeout(READING).ok()?.ok()
}

/// The ids of the volumes that are a guest's disks, by their handles.
fn volumes(xml: &[u8]) -> Result<Vec<String>, String> {
    if xml.len() as u64 > LONGEST {
        return Err(format!("its description has more than {LONGEST} bytes"));
    }
    let text = str::from_utf8(xml).map_err(|_| "its description is not UTF-8".to_owned())?;
    let mut reader = Reader::from_str(text);
    let mut path: Vec<String> = Vec::new();
    let mut found = Vec::new();
    loop {
        let event = reader.read_event().map_err(|error| format!("its description: {error}"))?;
        let (element, opens) = match &event {
            Event::Start(element) => (element, true),
            Event::Empty(element) => (element, false),
            Event::End(_) => {
                path.pop();
                continue;
            }
            Event::Eof if path.is_empty() => return Ok(found),
            Event::Eof => return Err("its description ends too early".to_owned()),
            _ => continue,
        };
        let above = path.iter().map(String::as_str);
        if element.name().as_ref() == "source"
            && above.eq(["domain", "devices", "disk"])
            && let Ok(Some(device)) = element.try_get_attribute("dev")
            && let Ok(device) = device.normalized_value(XmlVersion::Implicit1_0)
            && let Some(id) = device.strip_prefix(HANDLE)
            && check_id(id).is_ok()
            && !found.iter().any(|known| known == id)
        {
            found.push(id.to_owned());
        }
        if opens {
            if path.len() == DEEPEST {
                return Err(format!("its description is nested deeper than {DEEPEST}"));
            }
            path.push(element.name().as_ref().to_owned());
        }
    }
}

#[cfg(test)]
mod test {
    use proptest::prelude::*;

    use super::*;

    const ID: &str = "11111111-2222-4333-8444-555555555555";

    fn disk(source: &str) -> String {
        format!(
            "<?xml version='1.0'?>\n<domain type='qemu' id='7'><name>vm</name><devices>\
             <disk type='block' device='disk'><driver name='qemu' cache='none'/>{source}\
             <target dev='vda' bus='virtio'/></disk></devices></domain>"
        )
    }

    #[test]
    fn the_sources_of_disks_that_are_handles_are_volumes() {
        let handle = format!("<source dev='{HANDLE}{ID}' index='1'><slices/></source>");
        assert_eq!(volumes(disk(&handle).as_bytes()), Ok(vec![ID.to_owned()]));
        let twice = disk(&format!("{handle}{handle}"));
        assert_eq!(volumes(twice.as_bytes()), Ok(vec![ID.to_owned()]), "told once");
        let escaped = format!("<source dev=\"/dev/mapper/dmlocal&#45;{ID}\"/>");
        assert_eq!(volumes(disk(&escaped).as_bytes()), Ok(vec![ID.to_owned()]));
    }

    #[test]
    fn whatever_else_a_guest_has_is_no_volume() {
        for source in [
            format!("<source file='{HANDLE}{ID}'/>"),
            "<source dev='/dev/sda'/>".to_owned(),
            format!("<source dev='{HANDLE}{ID}-g1-clone'/>"),
            format!("<source dev='{HANDLE}../sda'/>"),
            format!("<mirror><source dev='{HANDLE}{ID}'/></mirror>"),
            format!("<backingStore type='block'><source dev='{HANDLE}{ID}'/></backingStore>"),
            format!("<!-- <source dev='{HANDLE}{ID}'/> -->"),
        ] {
            assert_eq!(volumes(disk(&source).as_bytes()), Ok(vec![]), "{source}");
        }
        assert_eq!(volumes(b""), Ok(vec![]));
    }

    #[test]
    fn what_is_no_description_is_told_and_bounded() {
        let deep = "<a>".repeat(10_000);
        let long = vec![b' '; usize::try_from(LONGEST).unwrap() + 1];
        let bomb = "<!DOCTYPE d [<!ENTITY a 'aaaa'><!ENTITY b '&a;&a;'>]><domain><devices>\
                    <disk><source dev='&b;'/></disk></devices></domain>";
        for bad in [b"<domain>", &b"<domain></disk>"[..], &[0xff, 0xfe], deep.as_bytes(), &long] {
            assert!(volumes(bad).is_err(), "{} bytes", bad.len());
        }
        assert_eq!(volumes(bomb.as_bytes()), Ok(vec![]), "no entity is expanded");
    }

    proptest! {
        #[test]
        fn nothing_makes_it_panic(text in "[<>/a-z='\"&;!\\[\\]? -]{0,200}", bytes: Vec<u8>) {
            let _ = volumes(text.as_bytes());
            let _ = volumes(disk(&text).as_bytes());
            let _ = volumes(&bytes);
        }
    }
}
