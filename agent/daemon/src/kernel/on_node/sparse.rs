//! What was never written: what the pool says of it, and what a clone makes of it.

use dmlocal_model::{
    hydration::Tuning,
    plan,
    seeding::{AllocationMap, Run, Written},
    volume::{ExportName, Lineage, Phase, Receiving, ReceivingStage, Record, Source},
};

use super::*;
use crate::{
    config::Config,
    kernel::{Kernel, StepError, agree, real::RealKernel},
};

fn kernel(bed: &Bed, state: &Path) -> RealKernel {
    let config = format!(
        "node = \"a\"\nstate = {state:?}\n[[pool]]\nname = \"pool\"\nvolume_group = {:?}\n\
         thin_pool = {:?}\ndevices = {:?}\n",
        bed.vg.name, bed.vg.thin_pool, bed.vg.devices
    );
    RealKernel::new(&Config::parse(&config).unwrap(), agree::HOST).unwrap()
}

fn record(volume: Volume, data: &Lv, phase: Phase) -> Record {
    Record {
        id: volume.0,
        incarnation: Uuid::new_v4(),
        pool: "pool".to_owned(),
        size: Sectors::from_bytes(SIZE),
        logical_block_size: 512,
        generation: Generation(1),
        made_in: Generation(1),
        attached: true,
        data: Some(data.dm_uuid()),
        growing: None,
        came_by: None,
        lent_before: None,
        confirmed_in: None,
        tuning: Tuning::default(),
        lineage: Lineage::default(),
        phase,
    }
}

fn tpool(bed: &Bed) -> DmName {
    let uuid = bed.vg.pool().unwrap().unwrap().tpool_dm_uuid();
    DmName { name: "the thin pool".to_owned(), uuid }
}

fn snapshot(bed: &Bed) -> String {
    let status = bed.dm.status_text_of(&tpool(bed).uuid).unwrap();
    status.split_ascii_whitespace().nth(3).unwrap().to_owned()
}

#[test]
#[ignore = "needs root and a node's kernel"]
fn a_thin_pool_says_what_was_never_written() {
    let bed = Bed::new();
    let state = tempfile::tempdir().unwrap();
    let kernel = kernel(&bed, state.path());
    let volume = Volume::new();
    let made = bed.vg.create(Some((&volume.data(1), SIZE)), None, &[]).unwrap();
    let data = &made[0];
    let record = record(volume, data, Phase::Local);
    let file = open(bed.number(data), true);
    let told = |what: &str| timed(what, || kernel.allocation(&record, REGION).unwrap());
    assert_eq!(told("nothing written").runs(), [Run { first: 0, count: SIZE / 65536 }]);

    // A part of a chunk, two in a row, and the last.
    write_at(&file, 4096, 1).unwrap();
    write_at(&file, 5 * 65536, 1).unwrap();
    write_at(&file, 6 * 65536 + 8192, 1).unwrap();
    write_at(&file, SIZE - 4096, 1).unwrap();
    let last = SIZE / 65536 - 1;
    let runs = [Run { first: 1, count: 4 }, Run { first: 7, count: last - 7 }];
    assert_eq!(told("four chunks written").runs(), runs);
    let large = kernel.allocation(&record, Sectors(4 * 128)).unwrap();
    assert_eq!(large.runs(), [Run { first: 2, count: SIZE / (4 * 65536) - 3 }]);
    let status = bed.dm.status_text_of(&data.dm_uuid()).unwrap();
    println!("status of a thin volume: {status}");
    assert_eq!(snapshot(&bed), "-", "a metadata snapshot is left");

    // Somebody else's is neither used nor dropped.
    bed.dm.message(&tpool(&bed), "reserve_metadata_snap").unwrap();
    let theirs = snapshot(&bed);
    assert!(matches!(kernel.allocation(&record, REGION), Err(StepError::Refused(_))));
    assert_eq!(snapshot(&bed), theirs);
    // Ours of a process that died is dropped, by the next start and by the next use.
    let note = state.path().join("metadata-snapshot-pool");
    fs::write(&note, &theirs).unwrap();
    assert_eq!(told("after a crash").runs(), runs);
    assert!(snapshot(&bed) == "-" && !note.exists());
    bed.dm.message(&tpool(&bed), "reserve_metadata_snap").unwrap();
    fs::write(&note, "").unwrap();
    kernel.activate(Some("pool")).unwrap();
    assert!(snapshot(&bed) == "-" && !note.exists());

    // What holds something is never taken for a new one.
    let make = plan::Step::Allocate { data: SIZE, meta: None, of: None };
    let old = kernel.apply(&record, &make);
    assert!(matches!(&old, Err(StepError::Failed(why)) if why.contains("content")), "{old:?}");
    let blank = self::record(Volume::new(), data, Phase::Local);
    let made = kernel.apply(&blank, &make).unwrap();
    assert_eq!(kernel.apply(&blank, &make).unwrap(), made, "not adopted");
}

#[test]
#[ignore = "needs root and a node's kernel"]
fn what_was_never_written_is_marked_and_nothing_else_changes() {
    let mut bed = Bed::new();
    let state = tempfile::tempdir().unwrap();
    let kernel = kernel(&bed, state.path());
    let volume = Volume::new();
    // The upper half of the source is full; of the lower one nobody wrote anything.
    let half = SIZE / 2;
    let (_, _, namespace) = bed.exported(volume, |device| {
        let file = open(device, true);
        let mut buffer = Buffer::new(MIB);
        for from in (half..SIZE).step_by(1 << 20) {
            for (block, at) in buffer.bytes().chunks_mut(4096).zip(blocks(from)) {
                block.fill(pattern(at));
            }
            file.write_all_at(buffer.bytes(), from).unwrap();
        }
        file.sync_all().unwrap();
    });
    let (data, meta) = (volume.data(1), volume.meta(1));
    let made = bed.vg.create(Some((&data, SIZE)), Some((&meta, 4 * MIB)), &[]).unwrap();
    let (dest, meta) = (bed.number(&made[0]), bed.number(&made[1]));
    let [handle, clone, src] =
        [Role::Handle, Role::Clone, Role::Src].map(|role| volume.name(1, role));
    bed.set(&src, Target::Queue { path: Some(namespace) });
    let src = bed.dm.device(&src).unwrap().unwrap().number;
    block::zero_block0(meta).unwrap();
    bed.set(&clone, Target::Clone { meta, dest, src, region: REGION });
    let below = bed.dm.device(&clone).unwrap().unwrap().number;
    let queue = |name: &str| {
        let path = format!("/sys/dev/block/{below}/queue/{name}");
        fs::read_to_string(path).unwrap().trim().to_owned()
    };
    let shown = || {
        let names = ["discard_granularity", "discard_max_hw_bytes", "discard_max_bytes"];
        println!("{names:?} of the clone: {:?}", names.map(queue));
    };
    shown();
    block::block_discards(below).unwrap();
    shown();
    bed.set(&handle, Target::Linear { device: below, offset: Sectors(0) });
    let number = bed.dm.device(&handle).unwrap().unwrap().number;

    let export = ExportName {
        subsystem_nqn: String::new(),
        namespace_uuid: Uuid::nil(),
        namespace_nguid: Uuid::nil(),
        address: "127.0.0.1".to_owned(),
        port: 1,
    };
    let source = Source {
        grant: Uuid::new_v4(),
        node: "a".to_owned(),
        endpoint: "https://a".to_owned(),
        generation: Generation(1),
        hold: true,
        depth: 1,
        export,
    };
    let receiving = Receiving {
        source,
        meta: Some(made[1].dm_uuid()),
        length: Sectors::from_bytes(SIZE),
        region: REGION,
        floor: 0,
        seeding: Default::default(),
        forgotten: false,
        turn: 1,
        stage: ReceivingStage::Hydrating,
        rebuild: None,
        forced: false,
        remote: None,
        failure: None,
    };
    let record = record(volume, &made[0], Phase::Receiving(Box::new(receiving)));
    assert_eq!(plan::dm_name(&record, Role::Clone), clone);
    let mut written = Written::new(record.size, REGION).unwrap();
    written.add(Sectors::from_bytes(half), Sectors::from_bytes(half));
    let map = AllocationMap {
        grant: Uuid::nil(),
        incarnation: record.incarnation,
        generation: Generation(1),
        length: record.size,
        region: REGION,
        unwritten: written.rest(),
    };
    let hydrated = || match bed.dm.clone_status(&clone).unwrap() {
        CloneStatus::Working { hydrated, read_only: false, .. } => hydrated,
        status => panic!("{status:?}"),
    };

    // Written before: a whole region, a part of one, and in the full half.
    let early = [0, 65536 + 4096, half + 4096];
    let file = open(number, true);
    for at in early {
        write_at(&file, at, 0xee).unwrap();
    }
    file.sync_all().unwrap();
    assert_eq!(hydrated(), 3, "written so far");
    // Written all the time, by somebody who must not notice more than a pause.
    let stop = std::sync::Arc::new(std::sync::atomic::AtomicBool::new(false));
    let stopped = std::sync::Arc::clone(&stop);
    let writing = behind(move || {
        let file = open(number, true);
        let (mut longest, mut count) = (Duration::ZERO, 0_u64);
        while !stopped.load(std::sync::atomic::Ordering::Relaxed) {
            let before = Instant::now();
            write_at(&file, 8 * 65536 + (count % 16) * 4096, 0xdd).unwrap();
            longest = longest.max(before.elapsed());
            count += 1;
        }
        (longest, count)
    });
    thread::sleep(SHORT);
    let step = plan::Step::Seed(std::sync::Arc::new(map));
    timed("seed", || kernel.apply(&record, &step).unwrap());
    timed("seed again", || kernel.apply(&record, &step).unwrap());
    thread::sleep(SHORT);
    stop.store(true, std::sync::atomic::Ordering::Relaxed);
    let (longest, count) = writing.recv_timeout(LONG).unwrap();
    println!("the longest of {count} writes beside it: {longest:?}");

    assert_eq!(hydrated(), half / 65536 + 1, "the lower half, and one of the upper");
    for device in [below, number] {
        assert_eq!(block::discard_max(device).unwrap(), 0, "discards are let through");
    }
    assert!(!bed.dm.device(&handle).unwrap().unwrap().suspended);
    // Written after, in part, where nothing was ever written before.
    write_at(&file, 40 * 65536 + 4096, 0xcc).unwrap();
    file.sync_all().unwrap();
    let expected = move |at: u64| match at {
        _ if early.contains(&at) => Some(0xee),
        _ if (8 * 65536..9 * 65536).contains(&at) && count > 15 => Some(0xdd),
        _ if at == 40 * 65536 + 4096 => Some(0xcc),
        _ if at < half => Some(0),
        _ => None,
    };
    verify(number, expected);

    // A copy that goes on, and a clone that would pass discards down, are refused.
    bed.dm.message(&clone, "enable_hydration").unwrap();
    assert!(kernel.apply(&record, &step).is_err(), "marked while copying");
    assert!(!bed.dm.device(&handle).unwrap().unwrap().suspended);
    until("hydration", || super::hydrated(&bed.dm.clone_status(&clone).unwrap()));
    bed.dm.message(&clone, "disable_hydration").unwrap();
    verify(number, expected);
    let status = bed.dm.status_text_of(&made[0].dm_uuid()).unwrap();
    let mapped: u64 = status.split(' ').next().unwrap().parse().unwrap();
    println!("allocated at the end: {mapped} of {} sectors", SIZE / 512);
    assert!(mapped <= half / 512 + 5 * 128, "what was never written takes room");

    drop(file);
    bed.dm.remove(&handle, Remove::Now).unwrap();
    bed.dm.remove(&clone, Remove::Now).unwrap();
    let line = format!("0 {} clone {meta} {dest} {src} 128 1 no_hydration", SIZE / 512);
    sh("dmsetup", &["create", &clone.name, "--uuid", &clone.uuid, "--table", &line]);
    let passing = kernel.apply(&record, &step);
    assert!(matches!(passing, Err(StepError::Refused(_))), "{passing:?}");
}
