//! The table of transitions, whole: what may follow what, and nothing else.

use std::collections::BTreeSet;

use super::*;
use crate::{hydration::Tuning, seeding::Seeding};

const LENT: &str = "
    Published --FenceAsked--> Fencing
    Published --RevokeAsked--> Revoking
    Fencing --FenceAsked--> Fencing
    Fencing --Fenced--> Fenced
    Fenced --FenceAsked--> Fenced
    Fenced --Fenced--> Fenced
    Fenced --ReleaseAsked--> Releasing
    Revoking --RevokeAsked--> Revoking
    Revoking --Revoked--> local
    Releasing --ReleaseAsked--> Releasing";

const RECEIVING: &str = "
    Allocating --Allocated--> Zeroing
    Allocating --AbortAsked--> Aborting
    Zeroing --Zeroed--> Assembling
    Zeroing --AbortAsked--> Aborting
    Assembling --Armed--> Held
    Assembling --AbortAsked--> Aborting
    Held --SwitchAsked--> Switching
    Held --SourceGrew--> Held
    Held --AbortAsked--> Aborting
    Held --Failed--> Held
    Switching --SwitchAsked--> Switching
    Switching --SourceGrew--> Switching
    Switching --SourceFenced--> Hydrating
    Switching --SourceRefused--> Refused
    Switching --Failed--> Switching
    Refused --SwitchAsked--> Switching
    Refused --AbortAsked--> Aborting
    Refused --Failed--> Refused
    Hydrating --Floor--> Hydrating
    Hydrating --Seeded--> Hydrating
    Hydrating --SeedingSkipped--> Hydrating
    Hydrating --Committed--> Collapsing
    Hydrating --SourceForgotten--> Hydrating
    Hydrating --Failed--> Hydrating
    Hydrating --DeleteAsked--> Discarding
    Collapsing --Collapsed--> Parting
    Collapsing --SourceForgotten--> Collapsing
    Collapsing --DeleteAsked--> Discarding
    Parting --MetaRetired--> Parting
    Parting --SourceReleased--> local
    Parting --SourceForgotten--> Parting
    Parting --DeleteAsked--> Discarding
    Aborting --AbortAsked--> Aborting
    Aborting --Retired--> Withdrawing
    Withdrawing --SourceForgotten--> Withdrawing
    Discarding --DeleteAsked--> Discarding
    Discarding --SourceForgotten--> Discarding
    Discarding --Retired--> Discarded
    Discarded --SourceForgotten--> Discarded";

fn events() -> Vec<Event> {
    let failure = Failure { why: "why".into(), boot: Uuid::from_u128(1) };
    let snapshot = VolumeId::new(Uuid::from_u128(8));
    vec![
        Event::Allocated { data: "data".into(), meta: Some("meta".into()) },
        Event::SourceGrew(Sectors(16)),
        Event::Zeroed,
        Event::Armed,
        Event::SwitchAsked,
        Event::SourceFenced,
        Event::SourceRefused,
        Event::Floor(1),
        Event::Seeded,
        Event::SeedingSkipped,
        Event::Committed,
        Event::Collapsed,
        Event::SourceReleased,
        Event::SourceForgotten,
        Event::MetaRetired,
        Event::AbortAsked,
        Event::Retired,
        Event::Failed(failure),
        Event::FenceAsked,
        Event::Fenced,
        Event::RevokeAsked,
        Event::Revoked,
        Event::ReleaseAsked,
        Event::DeleteAsked,
        Event::Allocated { data: "new".into(), meta: None },
        Event::RevertAsked { snapshot, template: template(), size: Sectors(4) },
        Event::RevertGivenUp,
    ]
}

fn template() -> Template {
    Template { data: "of".into(), name: "name".into() }
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

fn lent(stage: LentStage) -> Lent {
    let to = Borrower { grant: Uuid::from_u128(4), node: "b".into(), endpoint: "https://b".into() };
    Lent { to, host_nqn: "host".into(), hold: true, export: export(), stage }
}

fn receiving(stage: ReceivingStage, hold: bool) -> Receiving {
    Receiving {
        source: Source {
            grant: Uuid::from_u128(5),
            node: "a".into(),
            endpoint: "https://a".into(),
            generation: Generation(1),
            hold,
            depth: 1,
            export: export(),
        },
        meta: None,
        length: Sectors(8),
        region: Sectors(8),
        floor: 0,
        forgotten: false,
        turn: 0,
        seeding: Seeding::Wanted,
        stage,
        rebuild: None,
        forced: false,
        failure: None,
    }
}

fn record(phase: Phase) -> Record {
    Record {
        id: VolumeId::new(Uuid::from_u128(6)),
        incarnation: Uuid::from_u128(7),
        pool: "pool".into(),
        size: Sectors(8),
        logical_block_size: 512,
        generation: Generation(2),
        attached: false,
        data: None,
        growing: None,
        came_by: None,
        lent_before: None,
        confirmed_in: None,
        tuning: Tuning::default(),
        lineage: Lineage::default(),
        phase,
    }
}

fn word(value: &impl std::fmt::Debug) -> String {
    let text = format!("{value:?}");
    text.split(|c: char| !c.is_alphanumeric()).next().unwrap_or_default().to_owned()
}

fn table(text: &str) -> BTreeSet<String> {
    text.lines().map(str::trim).filter(|line| !line.is_empty()).map(str::to_owned).collect()
}

fn transitions<S: std::fmt::Debug>(
    stages: &[S],
    phase: impl Fn(&S) -> Phase,
    stage_of: impl Fn(&Record) -> Option<String>,
) -> BTreeSet<String> {
    let mut found = BTreeSet::new();
    for stage in stages {
        for event in events() {
            let name = word(&event);
            if let Ok(after) = record(phase(stage)).after(event) {
                let to = stage_of(&after).unwrap_or_else(|| "local".to_owned());
                found.insert(format!("{} --{name}--> {to}", word(stage)));
            }
        }
    }
    found
}

const LENT_STAGES: [LentStage; 5] = [
    LentStage::Published,
    LentStage::Fencing,
    LentStage::Fenced,
    LentStage::Revoking,
    LentStage::Releasing,
];

const RECEIVING_STAGES: [ReceivingStage; 13] = [
    ReceivingStage::Allocating,
    ReceivingStage::Zeroing,
    ReceivingStage::Assembling,
    ReceivingStage::Held,
    ReceivingStage::Switching,
    ReceivingStage::Refused,
    ReceivingStage::Hydrating,
    ReceivingStage::Collapsing,
    ReceivingStage::Parting,
    ReceivingStage::Aborting,
    ReceivingStage::Withdrawing,
    ReceivingStage::Discarding,
    ReceivingStage::Discarded,
];

#[test]
fn a_lent_copy_goes_these_ways_only() {
    let found = transitions(
        &LENT_STAGES,
        |stage| Phase::Lent(lent(*stage)),
        |after| after.lent().map(|lent| word(&lent.stage)),
    );
    assert_eq!(found, table(LENT));
}

#[test]
fn a_received_copy_goes_these_ways_only() {
    let found = transitions(
        &RECEIVING_STAGES,
        |stage| Phase::Receiving(Box::new(receiving(*stage, true))),
        |after| after.receiving().map(|receiving| word(&receiving.stage)),
    );
    assert_eq!(found, table(RECEIVING));
}

#[test]
fn a_cold_move_is_never_held_and_a_refused_one_is_taken_down() {
    let after = |stage, event| {
        let cold = record(Phase::Receiving(Box::new(receiving(stage, false))));
        cold.after(event).unwrap().receiving().unwrap().stage
    };
    assert_eq!(after(ReceivingStage::Assembling, Event::Armed), ReceivingStage::Switching);
    let refused = after(ReceivingStage::Switching, Event::SourceRefused);
    assert_eq!(refused, ReceivingStage::Aborting);
}

/// In a chain each side goes its own way, and neither takes the other's events.
#[test]
fn a_relaying_copy_is_both_and_ends_as_what_is_left() {
    let relay = |receiving_stage, lent_stage| {
        let (receiving, lent) = (receiving(receiving_stage, true), lent(lent_stage));
        record(Phase::Relaying(Box::new(Relay { receiving, lent })))
    };
    let owner = ReceivingStage::Parting;
    let whole = relay(owner, LentStage::Fenced).after(Event::SourceReleased).unwrap();
    assert!(matches!(whole.phase, Phase::Lent(_)), "everything is here, and it is still lent");
    let alone = relay(owner, LentStage::Revoking).after(Event::Revoked).unwrap();
    assert!(matches!(alone.phase, Phase::Receiving(_)), "nobody else wants it any more");
    for stage in LENT_STAGES {
        let deleted = relay(owner, stage).after(Event::DeleteAsked);
        assert!(deleted.is_err(), "deleted while it is lent: {stage:?}");
        let released = relay(owner, stage).after(Event::ReleaseAsked).is_ok();
        assert_eq!(released, matches!(stage, LentStage::Fenced | LentStage::Releasing));
    }
    let early = relay(owner, LentStage::Releasing).after(Event::SourceReleased);
    assert!(early.is_err(), "it is being taken down: its source hears of it at the end");
    let retired = relay(ReceivingStage::Hydrating, LentStage::Releasing).after(Event::Retired);
    assert_eq!(retired.unwrap().receiving().unwrap().stage, ReceivingStage::Discarded);
}

const REVERTING: &str = "
    Making --Allocated--> Retiring
    Making --RevertGivenUp--> Undoing
    Undoing --RevertGivenUp--> Undoing
    Undoing --Retired--> local
    Retiring --Retired--> local";

#[test]
fn a_volume_goes_back_to_a_snapshot_in_one_change_of_the_journal() {
    let snapshot = VolumeId::new(Uuid::from_u128(8));
    let making = |stage: &RevertStage| {
        let (template, size, stage) = (template(), Sectors(4), stage.clone());
        Phase::Reverting(Box::new(Revert { snapshot, template, size, stage }))
    };
    let stage = |record: &Record| match &record.phase {
        Phase::Reverting(revert) => Some(word(&revert.stage)),
        _ => None,
    };
    let mut found = BTreeSet::new();
    for from in [RevertStage::Making, RevertStage::Undoing, RevertStage::Retiring("old".into())] {
        for event in events() {
            let before = Record { data: Some("old".into()), ..record(making(&from)) };
            let name = word(&event);
            let Ok(after) = before.after(event) else { continue };
            let to = stage(&after).unwrap_or_else(|| "local".to_owned());
            found.insert(format!("{} --{name}--> {to}", word(&from)));
            let reverted = to == "Retiring";
            let data = if reverted { "new" } else { "old" };
            assert_eq!(after.data.as_deref(), Some(data));
            assert_eq!(after.lineage.revision, u32::from(reverted), "its name");
            let grows = (after.size, after.growing);
            let smaller = (Sectors(4), Some(Sectors(8)));
            assert_eq!(grows, if reverted { smaller } else { (Sectors(8), None) });
        }
    }
    assert_eq!(found, table(REVERTING));
}

#[test]
fn a_copy_that_was_made_for_a_grant_goes_with_it() {
    let mut passing = record(Phase::Lent(lent(LentStage::Revoking)));
    passing.lineage.passing = true;
    assert_eq!(passing.after(Event::Revoked).unwrap().phase, Phase::Deleting);
    let mut half_made = record(Phase::Lent(lent(LentStage::Published)));
    half_made.lineage.template = Some(template());
    let made = Event::Allocated { data: "data".into(), meta: None };
    let after = half_made.after(made.clone()).unwrap();
    assert_eq!((after.data.as_deref(), &after.lineage.template), (Some("data"), &None));
    assert!(after.after(made).is_err(), "it has its data");
}
