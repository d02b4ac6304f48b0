//! What the `delay` target holds, and when it lets go.

use super::*;

#[test]
#[ignore = "needs root and a node's kernel"]
fn held_writes_wait_while_reads_and_flushes_pass() {
    let bed = Bed::new();
    let volume = Volume::new();
    let made = bed.vg.create(Some((&volume.data(1), SIZE)), None, &[]).unwrap();
    let lv = bed.number(&made[0]);
    fill(lv);
    let handle = volume.handle();
    bed.set(&handle, holds(lv, lv));
    println!("held, idle: {}", bed.status(&handle));
    let number = bed.dm.device(&handle).unwrap().unwrap().number;
    let writes: Vec<_> =
        (0..3).map(|n| behind(move || write_at(&open(number, true), n * 65536, 0xaa))).collect();
    writes.iter().for_each(|write| still_waits(write, SHORT));
    println!("held, three writes: {}", bed.status(&handle));
    assert_eq!(bed.status(&handle), "0 3 0");
    // A flush is for the source to answer, and is no sign of a guest.
    open(number, true).sync_all().unwrap();
    assert_eq!(bed.status(&handle), "0 3 0");
    verify(number, |_| None);
    timed("release", || bed.set(&handle, Target::Linear { device: lv, offset: Sectors(0) }));
    for write in &writes {
        write.recv_timeout(LONG).unwrap().unwrap();
    }
    let written = |at| (at < 3 * 65536 && at % 65536 == 0).then_some(0xaa);
    verify(lv, written);

    // Held again, then failed: what becomes of the writes?
    bed.set(&handle, holds(lv, lv));
    let write = behind(move || write_at(&open(number, true), 10 * 65536, 0xbb));
    still_waits(&write, SHORT);
    bed.set(&handle, Target::Error);
    let outcome = write.recv_timeout(LONG).unwrap();
    let landed = read_at(&open(lv, false), 10 * 65536).unwrap()[0] == 0xbb;
    println!("held, then `error`: the write ended {outcome:?}, it is on the device: {landed}");
}

#[test]
#[ignore = "needs root and a node's kernel"]
fn a_hold_that_could_not_be_swapped() {
    // The device below the hold is stuck, so the swap is interrupted.
    let bed = Bed::new();
    let volume = Volume::new();
    let made = bed.vg.create(Some((&volume.data(1), SIZE)), None, &[]).unwrap();
    let lv = bed.number(&made[0]);
    fill(lv);
    let (middle, handle) = (volume.name(1, Role::Clone), volume.handle());
    bed.set(&middle, Target::Linear { device: lv, offset: Sectors(0) });
    let below = bed.dm.device(&middle).unwrap().unwrap().number;
    bed.set(&handle, holds(below, below));
    let number = bed.dm.device(&handle).unwrap().unwrap().number;
    let write = behind(move || write_at(&open(number, true), 0, 0xcc));
    still_waits(&write, SHORT);
    // Suspended below, the released write cannot end.
    bed.dm.suspend(&middle, SHORT).unwrap();
    let error = bed
        .set_within(&handle, Target::Linear { device: below, offset: Sectors(0) }, SHORT)
        .unwrap_err();
    assert_eq!(error.kind(), io::ErrorKind::TimedOut);
    println!("interrupted: {error}; status {}", bed.status(&handle));
    bed.dm.resume(&middle).unwrap();
    let early = write.recv_timeout(SHORT);
    println!("a held write after an interrupted swap, with nobody releasing it: {early:?}");
    let second = behind(move || write_at(&open(number, true), 65536, 0xcd));
    let second = second.recv_timeout(SHORT);
    println!("a new write after an interrupted swap: {second:?}; {}", bed.status(&handle));
    bed.dm.suspend(&handle, LONG).unwrap();
    bed.dm.resume(&handle).unwrap();
    let third = behind(move || write_at(&open(number, true), 2 * 65536, 0xce));
    let waited = third.recv_timeout(SHORT);
    println!("a new write after suspend and resume: {waited:?}; {}", bed.status(&handle));
    bed.set(&handle, Target::Linear { device: below, offset: Sectors(0) });
}

#[test]
#[ignore = "needs root and a node's kernel"]
fn a_sealed_hold_fails_what_it_held() {
    let bed = Bed::new();
    let volume = Volume::new();
    let made = bed.vg.create(Some((&volume.data(1), SIZE)), None, &[]).unwrap();
    let lv = bed.number(&made[0]);
    let (middle, handle) = (volume.name(1, Role::Clone), volume.handle());
    bed.set(&middle, Target::Linear { device: lv, offset: Sectors(0) });
    let below = bed.dm.device(&middle).unwrap().unwrap().number;
    bed.set(&handle, holds(below, below));
    let number = bed.dm.device(&handle).unwrap().unwrap().number;
    let write = behind(move || write_at(&open(number, true), 0, 0xdd));
    still_waits(&write, SHORT);
    // What is below fails first: then there is nowhere for the writes to go.
    bed.set(&middle, Target::Error);
    still_waits(&write, SHORT);
    bed.set(&handle, Target::Error);
    assert!(write.recv_timeout(LONG).unwrap().is_err());
    assert_eq!(read_at(&open(lv, false), 0).unwrap()[0], 0);
}

#[test]
#[ignore = "needs root and a node's kernel"]
fn a_flush_of_a_held_handle_is_the_sources_and_the_copys() {
    let mut bed = Bed::new();
    let volume = Volume::new();
    let (lv, _, namespace) = bed.source(volume);
    let made = bed.vg.create(Some((&volume.data(1), SIZE)), None, &[]).unwrap();
    let data = bed.number(&made[0]);
    let [handle, copy, src] =
        [Role::Handle, Role::Clone, Role::Src].map(|role| volume.name(1, role));
    bed.set(&copy, Target::Linear { device: data, offset: Sectors(0) });
    let below = bed.dm.device(&copy).unwrap().unwrap().number;
    bed.set(&src, Target::Queue { path: Some(namespace) });
    let source = bed.dm.device(&src).unwrap().unwrap().number;
    let table = Table::held(Sectors::from_bytes(SIZE), below, source, Sectors(8));
    bed.dm.set(&handle, &table, Udev::Linked, LONG).unwrap();
    assert!(bed.dm.device(&handle).unwrap().unwrap().serves(&table));
    let number = bed.dm.device(&handle).unwrap().unwrap().number;
    let flush = || behind(move || open(number, true).sync_all());
    timed("flush at the source", || flush().recv_timeout(LONG).unwrap().unwrap());
    // It waits like a read while there is no way to the source.
    bed.set(&src, Target::Queue { path: None });
    let waiting = flush();
    still_waits(&waiting, SHORT);
    bed.set(&src, Target::Queue { path: Some(namespace) });
    waiting.recv_timeout(LONG).unwrap().unwrap();
    // What a peer may read it may flush, and not write; and the source's device is
    // what answers.
    block::flush(namespace).unwrap();
    assert!(write_at(&open(namespace, true), 0, 0xee).is_err());
    assert!(read_at(&open(lv, false), 0).unwrap() != vec![0xee; 4096]);
    // The copy's own device answers as well.
    for flushed in [volume.name(9, Role::Export), copy] {
        bed.dm.suspend(&flushed, LONG).unwrap();
        let waiting = flush();
        still_waits(&waiting, SHORT);
        bed.dm.resume(&flushed).unwrap();
        waiting.recv_timeout(LONG).unwrap().unwrap();
    }
}
