//! The planner by example: one test for each thing that would lose data if it
//! were otherwise.

mod remote;
mod seeding;
mod snapshots;

use uuid::Uuid;

use crate::{
    hydration::Tuning,
    name::{Generation, Role, VolumeId},
    plan::{Call, Device, Import, Lv, Next, Presence, Seen, Step, Wait, lv_names, made_lv, next},
    seeding::{Seeding, SourceMap},
    table::{CloneStatus, Table, Target},
    units::{DevNo, Sectors},
    volume::{
        Borrower, Event, ExportName, Failure, Lent, LentStage, Lineage, Moving, Phase, Rebuild,
        Receiving, ReceivingStage, Record, Relay, Source, Taken, Template,
    },
};

const SIZE: Sectors = Sectors(512);
const REGION: Sectors = Sectors(128);
const DATA: DevNo = DevNo { major: 253, minor: 1 };
const META: DevNo = DevNo { major: 253, minor: 2 };
const SRC: DevNo = DevNo { major: 253, minor: 3 };
const CLONE: DevNo = DevNo { major: 253, minor: 4 };
const NAMESPACE: DevNo = DevNo { major: 259, minor: 1 };

fn boot() -> Uuid {
    Uuid::from_u128(1)
}

fn table(target: Target) -> Table {
    Table::whole(SIZE, target)
}

fn device(number: DevNo, target: Target) -> Device {
    Device { number, table: Some(table(target)), suspended: false, open_count: 0, leaving: false }
}

fn export() -> ExportName {
    ExportName {
        subsystem_nqn: "nqn".into(),
        namespace_uuid: Uuid::from_u128(2),
        namespace_nguid: Uuid::from_u128(3),
        address: "127.0.0.1".into(),
        port: 4420,
    }
}

fn record(phase: Phase) -> Record {
    Record {
        id: VolumeId::new(Uuid::from_u128(4)),
        incarnation: Uuid::from_u128(5),
        pool: "pool".into(),
        size: SIZE,
        logical_block_size: 512,
        generation: Generation(2),
        made_in: Generation(2),
        attached: true,
        data: Some("data".into()),
        growing: None,
        came_by: None,
        lent_before: None,
        confirmed_in: None,
        tuning: Tuning::default(),
        lineage: Lineage::default(),
        phase,
    }
}

fn receiving(stage: ReceivingStage) -> Record {
    record(Phase::Receiving(Box::new(Receiving {
        source: Source {
            grant: Uuid::from_u128(6),
            node: "a".into(),
            endpoint: "https://a".into(),
            generation: Generation(1),
            hold: true,
            depth: 1,
            export: export(),
        },
        meta: Some("meta".into()),
        length: SIZE,
        region: REGION,
        floor: 2,
        forgotten: false,
        turn: 0,
        seeding: Seeding::Done,
        stage,
        rebuild: None,
        forced: false,
        remote: None,
        failure: None,
    })))
}

fn lent(stage: LentStage) -> Record {
    record(Phase::Lent(Lent {
        to: Borrower { grant: Uuid::from_u128(6), node: "b".into(), endpoint: "https://b".into() },
        host_nqn: "host".into(),
        hold: true,
        export: export(),
        stage,
        session: 0,
        served_in: None,
    }))
}

fn clone_table() -> Target {
    Target::Clone { meta: META, dest: DATA, src: SRC, region: REGION }
}

fn working(hydrated: u64) -> CloneStatus {
    CloneStatus::Working { hydrated, total: 4, hydrating: 0, enabled: true, read_only: false }
}

/// A destination in full swing, without a handle.
fn swing() -> Seen {
    Seen {
        boot: boot(),
        data: Some(Lv { device: DATA, length: SIZE }),
        meta: Some(Lv { device: META, length: Sectors(8192) }),
        handle: None,
        clone: Some(device(CLONE, clone_table())),
        src: Some(device(SRC, Target::Queue { path: Some(NAMESPACE) })),
        export: None,
        clone_status: Some(working(3)),
        discards_blocked: true,
        held: 0,
        published: Presence::Absent,
        import: Import { connected: true, namespace: Some(NAMESPACE), size: None, live: true },
        path_failed: false,
        connecting: false,
        resting: false,
        push: None,
        read: false,
        asked: false,
        steady: false,
        tuned: Some((Tuning::default().threshold, Tuning::default().batch)),
        cache_dropped: true,
        announced: true,
        map: SourceMap::Unasked,
        allocated: None,
    }
}

fn bare() -> Seen {
    Seen { clone: None, src: None, clone_status: None, discards_blocked: false, ..swing() }
}

fn handle(target: Target) -> Option<Device> {
    Some(device(DevNo { major: 253, minor: 9 }, target))
}

fn holding(length: Sectors) -> Table {
    Table::held(length, CLONE, SRC, Sectors(1))
}

fn held(length: Sectors) -> Option<Device> {
    with_table(holding(length))
}

fn with_table(table: Table) -> Option<Device> {
    let number = DevNo { major: 253, minor: 9 };
    Some(Device { table: Some(table), ..device(number, Target::Error) })
}

fn over_clone() -> Target {
    Target::Linear { device: CLONE, offset: Sectors(0) }
}

#[test]
fn a_held_handle_lets_no_write_through() {
    let Next::Do(steps) = next(&receiving(ReceivingStage::Held), &swing()) else { panic!() };
    assert_eq!(steps, [Step::Set(Role::Handle, holding(SIZE))]);
}

#[test]
fn the_first_held_write_asks_for_the_switch() {
    let seen = Seen { handle: held(SIZE), held: 1, ..swing() };
    assert_eq!(next(&receiving(ReceivingStage::Held), &seen), Next::Journal(Event::SwitchAsked));
    assert_eq!(next(&receiving(ReceivingStage::Switching), &seen), Next::Ask(Call::Fence));
}

#[test]
fn a_held_handle_grows_only_over_what_fails_every_write() {
    let grown = Sectors(2 * SIZE.0);
    let mut record = receiving(ReceivingStage::Held);
    let Phase::Receiving(receiving) = &mut record.phase else { panic!() };
    (receiving.length, receiving.rebuild) = (grown, Some(Rebuild::Emptying));
    record.size = grown;
    let import = Import { size: Some(grown), ..swing().import };
    let through = Target::ReadOnly { device: SRC, offset: Sectors(0) };
    let long = |number, target| {
        Some(Device { table: Some(Table::whole(grown, target)), ..device(number, Target::Error) })
    };
    let mut seen = Seen {
        data: Some(Lv { device: DATA, length: grown }),
        src: long(SRC, Target::Queue { path: Some(NAMESPACE) }),
        handle: held(SIZE),
        import,
        ..swing()
    };
    // First, because what the swap of the handle lets go of must not be acknowledged.
    let stand_in = Table::whole(grown, through.clone());
    let Next::Do(steps) = next(&record, &seen) else { panic!() };
    assert_eq!(steps, [Step::Set(Role::Clone, stand_in)]);
    (seen.clone, seen.clone_status) = (long(CLONE, through), None);
    let Next::Do(steps) = next(&record, &seen) else { panic!() };
    assert_eq!(steps, [Step::GrowHeld(holding(grown))]);
    // What waits already goes on waiting, in the handle as it is.
    seen.held = 1;
    assert_eq!(next(&record, &seen), Next::DoThen(Step::ZeroMeta(META), Event::Zeroed));
    let Phase::Receiving(receiving) = &mut record.phase else { panic!() };
    receiving.rebuild = None;
    (seen.clone, seen.clone_status, seen.held) =
        (long(CLONE, clone_table()), swing().clone_status, 0);
    assert_eq!(next(&record, &seen), Next::Wait(Wait::Switch), "over a clone it stays");
}

#[test]
fn a_clone_is_armed_only_by_its_magic_and_its_regions() {
    let seen = Seen { src: swing().src, ..bare() };
    let Next::Do(steps) = next(&receiving(ReceivingStage::Hydrating), &seen) else { panic!() };
    assert_eq!(steps, [Step::LoadClone { table: table(clone_table()), floor: Some(2) }]);
    let Next::Do(steps) = next(&receiving(ReceivingStage::Assembling), &seen) else { panic!() };
    assert_eq!(steps, [Step::LoadClone { table: table(clone_table()), floor: None }]);
}

#[test]
fn metadata_is_zeroed_in_one_stage_only() {
    let zeroing = next(&receiving(ReceivingStage::Zeroing), &bare());
    assert_eq!(zeroing, Next::DoThen(Step::ZeroMeta(META), Event::Zeroed));
    for stage in [
        ReceivingStage::Assembling,
        ReceivingStage::Held,
        ReceivingStage::Switching,
        ReceivingStage::Refused,
        ReceivingStage::Hydrating,
        ReceivingStage::Collapsing,
        ReceivingStage::Parting,
        ReceivingStage::Aborting,
    ] {
        for seen in [bare(), swing()] {
            let text = format!("{:?}", next(&receiving(stage), &seen));
            assert!(!text.contains("ZeroMeta"), "{stage:?}: {text}");
        }
    }
}

#[test]
fn discards_are_blocked_before_anything_stands_on_the_clone() {
    let seen = Seen { discards_blocked: false, ..swing() };
    for stage in [ReceivingStage::Held, ReceivingStage::Hydrating] {
        let blocked = Next::Do(vec![Step::BlockDiscards(CLONE)]);
        assert_eq!(next(&receiving(stage), &seen), blocked);
    }
}

#[test]
fn a_second_instance_of_the_metadata_is_never_loaded() {
    let other = device(CLONE, Target::Foreign { kind: "clone".into() });
    let seen = Seen { clone: Some(other), clone_status: None, ..swing() };
    assert_eq!(next(&receiving(ReceivingStage::Hydrating), &seen), Next::Wait(Wait::Operator));
}

#[test]
fn a_clone_is_never_built_again_once_everything_is_here() {
    for stage in [ReceivingStage::Collapsing, ReceivingStage::Parting] {
        let Next::Do(steps) = next(&receiving(stage), &bare()) else { panic!() };
        let on_data = Target::Linear { device: DATA, offset: Sectors(0) };
        assert_eq!(steps, [Step::Set(Role::Handle, table(on_data))]);
    }
}

#[test]
fn the_source_is_told_to_let_go_last() {
    let on_data = Target::Linear { device: DATA, offset: Sectors(0) };
    let whole = Seen { handle: handle(on_data.clone()), ..swing() };
    let collapsing = next(&receiving(ReceivingStage::Collapsing), &whole);
    assert_eq!(collapsing, Next::DoThen(Step::Flush(DATA), Event::Collapsed));
    let mut parting = receiving(ReceivingStage::Parting);
    let gone = Seen { import: Import::default(), handle: handle(on_data), ..bare() };
    assert_ne!(next(&parting, &gone), Next::Ask(Call::Release), "the metadata is still there");
    parting = parting.after(Event::MetaRetired).unwrap();
    assert_eq!(next(&parting, &gone), Next::Ask(Call::Release));
}

#[test]
fn everything_here_is_believed_only_after_a_commit() {
    let seen = Seen { handle: handle(over_clone()), clone_status: Some(working(4)), ..swing() };
    let complete = next(&receiving(ReceivingStage::Hydrating), &seen);
    assert_eq!(complete, Next::DoThen(Step::Commit, Event::Committed));
}

#[test]
fn a_clone_that_goes_back_in_time_stops_its_consumer_at_once() {
    let rewound = CloneStatus::Working {
        hydrated: 3,
        total: 4,
        hydrating: 0,
        enabled: true,
        read_only: true,
    };
    for status in [rewound, CloneStatus::Failed] {
        let seen = Seen { handle: handle(over_clone()), clone_status: Some(status), ..swing() };
        // Known before anything that may have to wait for the source.
        let Next::Journal(event) = next(&receiving(ReceivingStage::Hydrating), &seen) else {
            panic!("it goes on")
        };
        let failed = receiving(ReceivingStage::Hydrating).after(event).unwrap();
        assert_eq!(next(&failed, &seen), Next::Do(vec![Step::SuspendHandle]));
        let mut stopped = seen;
        stopped.handle.as_mut().unwrap().suspended = true;
        assert_eq!(next(&failed, &stopped), Next::Wait(Wait::Operator));
        // Consumers of a later boot have lost power anyway.
        stopped.boot = Uuid::from_u128(77);
        assert_eq!(next(&failed, &stopped), Next::Journal(Event::Rebooted));
    }
}

#[test]
fn copying_rests_while_the_source_is_silent_and_its_path_stays() {
    let away = Import { connected: true, namespace: Some(NAMESPACE), size: None, live: false };
    let seen = Seen { handle: handle(over_clone()), import: away, ..swing() };
    assert_eq!(
        next(&receiving(ReceivingStage::Hydrating), &seen),
        Next::Do(vec![Step::Hydrate(false)])
    );
    let gone = Import { connected: false, namespace: None, size: None, live: false };
    let mut seen = Seen { import: gone, ..seen };
    seen.clone_status = Some(CloneStatus::Working {
        hydrated: 3,
        total: 4,
        hydrating: 0,
        enabled: false,
        read_only: false,
    });
    assert_eq!(
        next(&receiving(ReceivingStage::Hydrating), &seen),
        Next::Do(vec![Step::Connect(export())])
    );
}

#[test]
fn a_namespace_with_a_new_number_becomes_the_path() {
    let number = DevNo { major: 259, minor: 7 };
    let import = Import { connected: true, namespace: Some(number), size: None, live: true };
    let seen = Seen { import, ..swing() };
    assert_eq!(
        next(&receiving(ReceivingStage::Hydrating), &seen),
        Next::Do(vec![Step::Set(Role::Src, table(Target::Queue { path: Some(number) }))])
    );
}

#[test]
fn a_destination_boots_without_its_source() {
    let seen = Seen { import: Import::default(), ..bare() };
    assert_eq!(
        next(&receiving(ReceivingStage::Hydrating), &seen),
        Next::Do(vec![Step::Set(Role::Src, table(Target::Queue { path: None }))])
    );
}

#[test]
fn copying_rests_above_the_high_water_mark() {
    let seen = Seen { handle: handle(over_clone()), resting: true, ..swing() };
    assert_eq!(
        next(&receiving(ReceivingStage::Hydrating), &seen),
        Next::Do(vec![Step::Hydrate(false)])
    );
}

#[test]
fn a_fence_fails_the_handle_then_flushes_and_leaves_the_export() {
    let on_data = Target::Linear { device: DATA, offset: Sectors(0) };
    let open = Seen {
        handle: handle(on_data),
        export: Some(device(SRC, Target::ReadOnly { device: DATA, offset: Sectors(0) })),
        published: Presence::Complete,
        ..bare()
    };
    let fencing = lent(LentStage::Fencing);
    assert_eq!(next(&fencing, &open), Next::Do(vec![Step::FenceHandle(table(Target::Error))]));
    let closed = Seen { handle: handle(Target::Error), ..open };
    assert_eq!(next(&fencing, &closed), Next::DoThen(Step::Flush(DATA), Event::Fenced));
    assert_eq!(next(&lent(LentStage::Fenced), &closed), Next::Wait(Wait::Peer));
}

#[test]
fn what_a_peer_reads_refuses_writes() {
    let seen = Seen { handle: None, ..bare() };
    let Next::Do(steps) = next(&lent(LentStage::Published), &seen) else { panic!() };
    assert_eq!(
        steps,
        [Step::Set(Role::Export, table(Target::ReadOnly { device: DATA, offset: Sectors(0) }))]
    );
}

#[test]
fn a_failure_names_its_boot_and_survives_the_journal() {
    let failed = Failure { why: "why".into(), boot: boot() };
    let record = receiving(ReceivingStage::Hydrating).after(Event::Failed(failed)).unwrap();
    let text = serde_json::to_string(&record).unwrap();
    assert_eq!(serde_json::from_str::<Record>(&text).unwrap(), record);
    let unknown = text.replacen("\"pool\"", "\"colour\":1,\"pool\"", 1);
    assert!(serde_json::from_str::<Record>(&unknown).is_err(), "fields come with versions");
}

#[test]
fn nobody_waits_for_the_answer_of_a_source_that_was_given_up() {
    let given_up = |stage| {
        let mut record = receiving(stage);
        let Phase::Receiving(receiving) = &mut record.phase else { panic!() };
        receiving.forgotten = true;
        receiving.meta = None;
        record
    };
    let parted = Seen {
        meta: None,
        import: Import::default(),
        handle: handle(Target::Linear { device: DATA, offset: Sectors(0) }),
        ..bare()
    };
    let parting = given_up(ReceivingStage::Parting);
    assert_eq!(next(&parting, &parted), Next::Journal(Event::SourceReleased));
    for stage in [ReceivingStage::Withdrawing, ReceivingStage::Discarded] {
        let mut record = given_up(stage);
        assert_eq!(next(&record, &parted), Next::Forget(vec![]), "{stage:?}");
        if stage == ReceivingStage::Discarded {
            let (receiving, Phase::Lent(lent)) =
                (record.receiving().unwrap().clone(), lent(LentStage::Releasing).phase)
            else {
                panic!()
            };
            record.phase = Phase::Relaying(Box::new(Relay { receiving, lent }));
            assert_eq!(next(&record, &parted), Next::Forget(vec![]), "the middle of a chain");
        }
    }
}

#[test]
fn what_waits_for_a_source_that_was_given_up_fails_and_nothing_more_is_copied() {
    let mut record = receiving(ReceivingStage::Hydrating);
    let Phase::Receiving(receiving) = &mut record.phase else { panic!() };
    receiving.forgotten = true;
    let one = |seen: &Seen| match next(&record, seen) {
        Next::Do(steps) => steps,
        next => panic!("{next:?}"),
    };
    let seen = Seen { handle: handle(over_clone()), ..swing() };
    assert_eq!(one(&seen), [Step::Hydrate(false)]);
    let CloneStatus::Working { hydrated, total, .. } = working(3) else { panic!() };
    let off =
        CloneStatus::Working { hydrated, total, hydrating: 0, enabled: false, read_only: false };
    let seen = Seen { clone_status: Some(off), ..seen };
    assert_eq!(one(&seen), [Step::CutSource(export())]);
    let multipath = Target::Foreign { kind: "multipath".into() };
    let cut = Seen { import: Import::default(), src: Some(device(SRC, multipath)), ..seen };
    assert_eq!(one(&cut), [Step::Set(Role::Src, table(Target::Lost))]);
    let lost = Seen { src: Some(device(SRC, Target::Lost)), ..cut.clone() };
    assert_eq!(next(&record, &lost), Next::Wait(Wait::Lost));
    // After a reboot the same, and nobody looks for the source.
    let booted = Seen { src: None, clone: None, clone_status: None, ..cut };
    assert_eq!(one(&booted), [Step::Set(Role::Src, table(Target::Lost))]);
}
