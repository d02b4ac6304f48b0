//! What was never written, by example.

use std::sync::Arc;

use super::*;
use crate::{
    admit::{self, Claim, Refusal},
    seeding::{AllocationMap, Written},
    volume::Relay,
};

/// The second of four regions was written, and the third.
fn map() -> AllocationMap {
    let mut written = Written::new(SIZE, REGION).unwrap();
    written.add(Sectors(128), Sectors(256));
    AllocationMap {
        grant: Uuid::from_u128(6),
        incarnation: Uuid::from_u128(5),
        generation: Generation(1),
        length: SIZE,
        region: REGION,
        unwritten: written.rest(),
    }
}

fn unseeded() -> Record {
    let mut record = receiving(ReceivingStage::Hydrating);
    let Phase::Receiving(receiving) = &mut record.phase else { panic!() };
    receiving.seeding = Seeding::Wanted;
    record
}

fn open(map: SourceMap) -> Seen {
    let enabled = |enabled| CloneStatus::Working {
        hydrated: 1,
        total: 4,
        hydrating: 0,
        enabled,
        read_only: false,
    };
    Seen { handle: handle(over_clone()), clone_status: Some(enabled(false)), map, ..swing() }
}

fn seeds(map: AllocationMap) -> Next {
    next(&unseeded(), &open(SourceMap::Known(Arc::new(map))))
}

#[test]
fn nothing_is_copied_before_the_source_has_said_what_it_has() {
    assert_eq!(next(&unseeded(), &open(SourceMap::Unasked)), Next::AskForMap);
    assert_eq!(next(&unseeded(), &open(SourceMap::Asked)), Next::Wait(Wait::Map));
    let seed = Next::DoThen(Step::Seed(Arc::new(map())), Event::Seeded);
    assert_eq!(seeds(map()), seed);
    let skipped = next(&unseeded(), &open(SourceMap::Missing));
    assert_eq!(skipped, Next::Journal(Event::SeedingSkipped));
    // Somebody turned it on.
    let on = Seen { clone_status: Some(working(1)), ..open(SourceMap::Known(Arc::new(map()))) };
    assert_eq!(next(&unseeded(), &on), one(Step::Hydrate(false)));
}

fn one(step: Step) -> Next {
    Next::Do(vec![step])
}

#[test]
fn a_map_of_anything_else_is_no_map() {
    let skipped = Next::Journal(Event::SeedingSkipped);
    assert_eq!(seeds(AllocationMap { grant: Uuid::from_u128(9), ..map() }), skipped);
    assert_eq!(seeds(AllocationMap { incarnation: Uuid::from_u128(9), ..map() }), skipped);
    assert_eq!(seeds(AllocationMap { generation: Generation(2), ..map() }), skipped);
    assert_eq!(seeds(AllocationMap { length: Sectors(1024), ..map() }), skipped);
    assert_eq!(seeds(AllocationMap { region: Sectors(64), ..map() }), skipped);
}

#[test]
fn an_agent_that_died_while_the_handle_waited_finds_the_way_back() {
    // First nothing may come through any more, then everything may go on.
    let mut seen = Seen { discards_blocked: false, ..open(SourceMap::Unasked) };
    seen.handle.as_mut().unwrap().suspended = true;
    assert_eq!(next(&unseeded(), &seen), one(Step::BlockDiscards(CLONE)));
    seen.discards_blocked = true;
    assert_eq!(next(&unseeded(), &seen), one(Step::Resume(Role::Handle)));
}

#[test]
fn what_a_lost_power_may_have_left_below_a_region_is_not_marked_as_being_here() {
    let map = SourceMap::Known(Arc::new(map()));
    let seen = Seen { map: map.clone(), ..bare() };
    let with_src = Seen { src: swing().src, ..seen };
    assert_eq!(next(&unseeded(), &with_src), Next::Journal(Event::SeedingSkipped));
    // Nobody could write before the switch.
    let mut switching = unseeded();
    let Phase::Receiving(receiving) = &mut switching.phase else { panic!() };
    receiving.stage = ReceivingStage::Switching;
    assert!(matches!(next(&switching, &with_src), Next::Do(steps)
        if matches!(steps[..], [Step::LoadClone { floor: Some(_), .. }])));
}

#[test]
fn a_source_says_what_it_has_only_when_that_is_final_and_whole() {
    let claim = Claim {
        grant: Uuid::from_u128(6),
        incarnation: Uuid::from_u128(5),
        generation: Generation(2),
        session: 0,
    };
    let unknown = |record: &Record| {
        matches!(admit::allocation(record, &claim), Err(Refusal::AllocationUnknown { .. }))
    };
    assert_eq!(admit::allocation(&lent(LentStage::Fenced), &claim), Ok(()));
    assert!(unknown(&lent(LentStage::Published)) && unknown(&lent(LentStage::Fencing)));
    assert!(unknown(&lent(LentStage::Yielding)) && unknown(&lent(LentStage::Serving)));
    assert!(admit::allocation(&lent(LentStage::Releasing), &claim).is_err());
    assert!(admit::allocation(&lent(LentStage::Reclaiming), &claim).is_err());
    let stale = Claim { generation: Generation(1), ..claim.clone() };
    assert!(admit::allocation(&lent(LentStage::Fenced), &stale).is_err());
    let Phase::Receiving(receiving) = receiving(ReceivingStage::Hydrating).phase else { panic!() };
    let Phase::Lent(lent) = lent(LentStage::Fenced).phase else { panic!() };
    assert!(unknown(&record(Phase::Relaying(Box::new(Relay { receiving: *receiving, lent })))));
}

#[test]
fn a_source_that_was_given_up_is_asked_for_nothing_any_more() {
    let mut record = unseeded();
    let Phase::Receiving(receiving) = &mut record.phase else { panic!() };
    receiving.forgotten = true;
    let src = Some(device(SRC, Target::Lost));
    for map in [SourceMap::Unasked, SourceMap::Asked, SourceMap::Known(Arc::new(map()))] {
        let seen = Seen { import: Import::default(), src: src.clone(), ..open(map) };
        assert_eq!(next(&record, &seen), Next::Wait(Wait::Lost));
    }
    // Nor after a reboot, when nobody knows what was below the rest.
    let booted = Seen { import: Import::default(), src, ..bare() };
    assert_eq!(next(&record, &booted), Next::Journal(Event::SeedingSkipped));
}
