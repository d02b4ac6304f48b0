//! A volume from the other side to this one.

use super::*;

#[test]
#[ignore = "needs root and a node's kernel"]
fn a_volume_is_received_hydrated_and_collapsed() {
    let mut bed = Bed::new();
    let volume = Volume::new();
    let (_, import, namespace) = bed.source(volume);
    println!("{:?}", bed.dm.targets().unwrap());
    println!("discards of the namespace: {}", block::discard_max(namespace).unwrap());

    let made = timed("create data and metadata", || {
        let (data, meta) = (volume.data(1), volume.meta(1));
        bed.vg.create(Some((&data, SIZE)), Some((&meta, 4 * MIB)), &["g1"]).unwrap()
    });
    let (dest, meta) = (bed.number(&made[0]), bed.number(&made[1]));
    let [handle, clone, src] =
        [Role::Handle, Role::Clone, Role::Src].map(|role| volume.name(1, role));

    bed.set(&src, Target::Queue { path: Some(namespace) });
    println!("multipath: {}", bed.status(&src));
    let src_number = bed.dm.device(&src).unwrap().unwrap().number;
    timed("zero block 0", || block::zero_block0(meta).unwrap());
    assert!(!block::clone_magic(meta).unwrap());
    let table = Target::Clone { meta, dest, src: src_number, region: REGION };
    bed.set(&clone, table.clone());
    let clone_number = bed.dm.device(&clone).unwrap().unwrap().number;
    assert_eq!(
        block::zero_block0(meta).unwrap_err().kind(),
        io::ErrorKind::ResourceBusy,
        "a device in a table was zeroed"
    );

    println!("discards of the clone: {}", block::discard_max(clone_number).unwrap());
    block::block_discards(clone_number).unwrap();
    bed.set(&handle, Target::Linear { device: clone_number, offset: Sectors(0) });
    assert!(Path::new(&handle.path()).exists(), "no {}", handle.path());
    let number = bed.dm.device(&handle).unwrap().unwrap().number;
    assert_eq!(block::discard_max(number).unwrap(), 0);
    assert_eq!(block::size(number).unwrap(), SIZE);

    // Neither what is below nor what is above brings discards back; only the
    // clone's own table would.
    bed.set(&src, Target::Queue { path: None });
    bed.set(&src, Target::Queue { path: Some(namespace) });
    assert_eq!(block::discard_max(clone_number).unwrap(), 0);
    bed.set(&handle, holds(clone_number, src_number));
    bed.set(&handle, Target::Linear { device: clone_number, offset: Sectors(0) });
    assert_eq!(block::discard_max(number).unwrap(), 0);

    // Whole regions, a part of one, and across a border.
    let writes = [0, 65536, 65536 + 4096, 3 * 65536 + 8192, 5 * 65536 - 4096, 5 * 65536];
    let written = move |at| writes.contains(&at).then_some(0xee);
    let file = open(number, true);
    for at in writes {
        write_at(&file, at, 0xee).unwrap();
    }
    file.sync_all().unwrap();
    timed("verify unhydrated", || verify(number, written));
    println!("clone: {:?} {}", bed.dm.clone_status(&clone).unwrap(), bed.status(&clone));
    assert!(block::clone_magic(meta).unwrap());

    timed("hydrate", || {
        bed.dm.message(&clone, "enable_hydration").unwrap();
        until("hydration", || hydrated(&bed.dm.clone_status(&clone).unwrap()));
    });
    for _ in 0..2 {
        assert!(hydrated(&bed.dm.commit_clone(&clone).unwrap()));
    }
    bed.dm.message(&clone, "disable_hydration").unwrap();
    timed("collapse", || {
        bed.set(&handle, Target::Linear { device: dest, offset: Sectors(0) });
    });
    println!("discards after the collapse: {}", block::discard_max(number).unwrap());
    block::flush(dest).unwrap();
    block::sync_and_drop_cache(number).unwrap();
    for name in [&clone, &src] {
        timed("remove a layer", || bed.dm.remove(name, Remove::Now).unwrap());
    }
    timed("disconnect", || nvme::disconnect(&import.nqn, LONG).unwrap());
    assert_eq!(nvme::observe(&import).unwrap(), nvme::Seen::default());
    let export = bed.exports[0].clone();
    timed("unpublish", || bed.target.unpublish(&export).unwrap());
    assert!(bed.target.ours().unwrap().is_empty());
    verify(number, written);
    assert_eq!(
        bed.dm.remove(&handle, Remove::Now).unwrap_err().kind(),
        io::ErrorKind::ResourceBusy,
        "an open handle was removed"
    );
    drop(file);
    timed("remove the handle", || bed.dm.remove(&handle, Remove::Now).unwrap());
    assert!(!Path::new(&handle.path()).exists());
    bed.dm.remove(&handle, Remove::Now).unwrap();
}

#[test]
#[ignore = "needs root and a node's kernel"]
fn what_a_crash_leaves_is_finished() {
    let bed = Bed::new();
    let volume = Volume::new();
    let made = bed.vg.create(Some((&volume.data(1), SIZE)), None, &[]).unwrap();
    let lv = bed.number(&made[0]);
    let handle = volume.handle();
    let dmsetup = |args: &[&str]| sh("dmsetup", args);
    let linear = Target::Linear { device: lv, offset: Sectors(0) };

    // Between create and load.
    dmsetup(&["create", &handle.name, "--notable", "--uuid", &handle.uuid]);
    assert!(!bed.dm.device(&handle).unwrap().unwrap().has_live);
    bed.set(&handle, linear.clone());
    // Between load and resume, of another table.
    let line = format!("0 {} error", SIZE / 512);
    dmsetup(&["load", &handle.name, "--table", &line]);
    assert!(bed.dm.device(&handle).unwrap().unwrap().has_inactive);
    bed.set(&handle, linear.clone());
    dmsetup(&["load", &handle.name, "--table", &line]);
    bed.dm.resume(&handle).unwrap();
    let device = bed.dm.device(&handle).unwrap().unwrap();
    assert!(!device.has_inactive && device.table.as_ref().unwrap().target == linear);
    // Suspended.
    bed.dm.suspend(&handle, LONG).unwrap();
    bed.set(&handle, linear.clone());
    // A table that the kernel does not take.
    let absent = Target::Linear { device: DevNo { major: 8, minor: 250 }, offset: Sectors(0) };
    let error = bed.set_within(&handle, absent.clone(), LONG).unwrap_err();
    println!("{error}");
    let device = bed.dm.device(&handle).unwrap().unwrap();
    assert!(!device.has_inactive && device.table.as_ref().unwrap().target == linear);
    let other = volume.name(1, Role::Clone);
    bed.set_within(&other, absent, LONG).unwrap_err();
    assert_eq!(bed.dm.device(&other).unwrap(), None, "a device without a table is left");

    // A foreign device of our name.
    let foreign = Volume::new().handle();
    dmsetup(&["create", &foreign.name, "--uuid", "FOREIGN-x", "--table", &line]);
    let error = bed.set_within(&foreign, linear, LONG).unwrap_err();
    assert_eq!(error.kind(), io::ErrorKind::AlreadyExists);
    assert!(bed.dm.remove(&foreign, Remove::Now).is_err());
    dmsetup(&["remove", &foreign.name]);
}

#[test]
#[ignore = "needs root and a node's kernel"]
fn the_handles_link_is_there_exactly_while_the_handle_is() {
    let bed = Bed::new();
    let volume = Volume::new();
    let made = bed.vg.create(Some((&volume.data(1), SIZE)), None, &[]).unwrap();
    let lv = bed.number(&made[0]);
    let handle = volume.handle();
    let before = Instant::now();
    for _ in 0..20 {
        bed.set(&handle, Target::Linear { device: lv, offset: Sectors(0) });
        let number = bed.dm.device(&handle).unwrap().unwrap().number;
        let link = fs::canonicalize(handle.path()).unwrap();
        assert_eq!(link, block::node(number).unwrap());
        timed("remove", || bed.dm.remove(&handle, Remove::Now).unwrap());
        assert!(!Path::new(&handle.path()).exists());
    }
    println!("20 rounds: {:?}", before.elapsed());
    bed.set(&handle, Target::Linear { device: lv, offset: Sectors(0) });
    let number = bed.dm.device(&handle).unwrap().unwrap().number;
    sh("udevadm", &["settle"]);
    let record = fs::read_to_string(format!("/run/udev/data/b{number}")).unwrap_or_default();
    println!("udev knows of the handle:\n{record}");
    assert!(Path::new(&handle.path()).exists(), "udev took the link away");
    // An open and close for writing does not make anybody look at the content.
    drop(open(number, true));
    sh("udevadm", &["settle"]);
}
