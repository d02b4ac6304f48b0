//! The table of transitions, whole: what may follow what, and nothing else.

use std::collections::BTreeSet;

use super::*;
use crate::{hydration::Tuning, seeding::Seeding};

const LENT: &str = "
    Published --FenceAsked--> Fencing
    Published --RevokeAsked--> Revoking
    Published --ServeAsked--> Yielding
    Fencing --FenceAsked--> Fencing
    Fencing --Fenced--> Fenced
    Fencing --Rebooted--> Serving
    Fenced --FenceAsked--> Fenced
    Fenced --Fenced--> Fenced
    Fenced --ReleaseAsked--> Releasing
    Revoking --RevokeAsked--> Revoking
    Revoking --Revoked--> local
    Releasing --ReleaseAsked--> Releasing
    Yielding --ServeAsked--> Yielding
    Yielding --Fenced--> Serving
    Serving --ServeAsked--> Serving
    Serving --FenceAsked--> Fencing
    Serving --ReturnAsked--> Reclaiming
    Reclaiming --ReturnAsked--> Reclaiming
    Reclaiming --Reclaimed--> local";

const REMOTE: &str = "
    Linking --Armed--> Held
    Linking --AbortAsked--> Aborting
    Linking --Rebooted--> Linking
    Held --SwitchAsked--> Switching
    Held --AbortAsked--> Aborting
    Held --Failed--> Held
    Held --Rebooted--> Held
    Switching --SwitchAsked--> Switching
    Switching --SourceGrew--> Switching
    Switching --SourceServes--> Remote
    Switching --SourceRefused--> Refused
    Switching --SessionLost--> Switching
    Switching --ReturnAsked--> Returning
    Switching --Failed--> Switching
    Switching --Rebooted--> Switching
    Refused --SwitchAsked--> Switching
    Refused --AbortAsked--> Aborting
    Refused --Failed--> Refused
    Refused --Rebooted--> Refused
    Aborting --AbortAsked--> Aborting
    Aborting --Retired--> Withdrawing
    Aborting --Rebooted--> Aborting
    Withdrawing --SourceForgotten--> Withdrawing
    Withdrawing --Rebooted--> Withdrawing
    Remote --SourceServes--> Remote
    Remote --SessionLost--> Remote
    Remote --LocalizeAsked--> Localizing
    Remote --ReturnAsked--> Returning
    Remote --Failed--> Remote
    Remote --Rebooted--> Remote
    Localizing --Allocated--> Localizing
    Localizing --LocalizeDropped--> Clearing
    Localizing --SourceServes--> Localizing
    Localizing --SessionLost--> Localizing
    Localizing --ReturnAsked--> Returning
    Localizing --Failed--> Localizing
    Localizing --Rebooted--> Localizing
    Building --Armed--> Settling
    Building --LocalizeDropped--> Clearing
    Building --SourceServes--> Building
    Building --SessionLost--> Building
    Building --ReturnAsked--> Returning
    Building --Failed--> Building
    Building --Rebooted--> Building
    Clearing --LocalizeDropped--> Clearing
    Clearing --Retired--> Remote
    Clearing --SourceServes--> Clearing
    Clearing --SessionLost--> Clearing
    Clearing --ReturnAsked--> Returning
    Clearing --Failed--> Clearing
    Clearing --Rebooted--> Clearing
    Settling --SourceFenced--> Hydrating
    Settling --ReturnAsked--> Returning
    Settling --SessionLost--> Settling
    Settling --Failed--> Settling
    Settling --Rebooted--> Settling
    Returning --ReturnAsked--> Returning
    Returning --Retired--> Returning
    Returning --Rebooted--> Returning";

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
    Switching --SwitchGivenUp--> Aborting
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
    Requesting --CopyGranted--> Forking
    Requesting --DeleteAsked--> Discarding
    Forking --Forked--> Hydrating
    Forking --DeleteAsked--> Discarding
    Discarding --DeleteAsked--> Discarding
    Discarding --SourceForgotten--> Discarding
    Discarding --Retired--> Discarded
    Discarded --SourceForgotten--> Discarded";

fn events() -> Vec<Event> {
    let failure = Failure { why: "why".into(), boot: Uuid::from_u128(1) };
    let snapshot = VolumeId::new(Uuid::from_u128(8));
    vec![
        Event::Allocated { data: "data".into(), meta: Some("meta".into()) },
        Event::CopyGranted(export()),
        Event::Forked { data: "data".into(), meta: "meta".into(), floor: 1 },
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
        Event::SwitchGivenUp,
        Event::Retired,
        Event::Failed(failure),
        Event::FenceAsked,
        Event::Fenced,
        Event::RevokeAsked,
        Event::Untaken,
        Event::Revoked,
        Event::ReleaseAsked,
        Event::DeleteAsked,
        Event::Allocated { data: "new".into(), meta: None },
        Event::RevertAsked { snapshot, template: template(), size: Sectors(4) },
        Event::RevertGivenUp,
        Event::SourceServes(Uuid::from_u128(1)),
        Event::SessionLost,
        Event::LocalizeAsked { pool: "pool".into(), region: Sectors(8) },
        Event::LocalizeDropped,
        Event::ServeAsked { session: 1, boot: Uuid::from_u128(1) },
        Event::ReturnAsked,
        Event::Reclaimed(Uuid::from_u128(1)),
    ]
}

fn template() -> Template {
    Template { data: "of".into(), name: "name".into(), moving: None }
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
    Lent {
        to,
        host_nqn: "host".into(),
        hold: true,
        export: export(),
        stage,
        session: 1,
        served_in: Some(Uuid::from_u128(8)),
    }
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
        remote: None,
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
        made_in: Generation(2),
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
    events: &[Event],
    phase: impl Fn(&S) -> Phase,
    stage_of: impl Fn(&Record) -> Option<String>,
) -> BTreeSet<String> {
    let mut found = BTreeSet::new();
    for stage in stages {
        for event in events {
            let name = word(event);
            if let Ok(after) = record(phase(stage)).after(event.clone()) {
                let to = stage_of(&after).unwrap_or_else(|| "local".to_owned());
                found.insert(format!("{} --{name}--> {to}", word(stage)));
            }
        }
    }
    found
}

const LENT_STAGES: [LentStage; 8] = [
    LentStage::Published,
    LentStage::Fencing,
    LentStage::Fenced,
    LentStage::Revoking,
    LentStage::Releasing,
    LentStage::Yielding,
    LentStage::Serving,
    LentStage::Reclaiming,
];

const RECEIVING_STAGES: [ReceivingStage; 15] = [
    ReceivingStage::Requesting,
    ReceivingStage::Forking,
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
        &[events(), vec![Event::Rebooted]].concat(),
        |stage| Phase::Lent(lent(*stage)),
        |after| after.lent().map(|lent| word(&lent.stage)),
    );
    assert_eq!(found, table(LENT));
}

#[test]
fn a_received_copy_goes_these_ways_only() {
    let found = transitions(
        &RECEIVING_STAGES,
        &events(),
        |stage| Phase::Receiving(Box::new(receiving(*stage, true))),
        |after| after.receiving().map(|receiving| word(&receiving.stage)),
    );
    assert_eq!(found, table(RECEIVING));
}

const REMOTE_STAGES: [ReceivingStage; 13] = [
    ReceivingStage::Linking,
    ReceivingStage::Held,
    ReceivingStage::Switching,
    ReceivingStage::Refused,
    ReceivingStage::Remote,
    ReceivingStage::Localizing,
    ReceivingStage::Building,
    ReceivingStage::Clearing,
    ReceivingStage::Settling,
    ReceivingStage::Returning,
    ReceivingStage::Aborting,
    ReceivingStage::Withdrawing,
    ReceivingStage::Hydrating,
];

#[test]
fn a_copy_that_is_elsewhere_goes_these_ways_only() {
    let remote = |stage: &ReceivingStage| {
        let remote = Some(Remote::new(false));
        Phase::Receiving(Box::new(Receiving { remote, ..receiving(*stage, true) }))
    };
    let found = transitions(
        &REMOTE_STAGES[..12],
        &[events(), vec![Event::Rebooted]].concat(),
        remote,
        |after| after.receiving().map(|receiving| word(&receiving.stage)),
    );
    assert_eq!(found, table(REMOTE));
}

/// Each session of consumers ends with the power of either node.
#[test]
fn a_session_ends_with_the_power_of_either_node() {
    let boot = Uuid::from_u128(9);
    let mut copy = receiving(ReceivingStage::Switching, true);
    copy.remote = Some(Remote::new(false));
    let copy = record(Phase::Receiving(Box::new(copy)));
    assert_eq!(copy.source_lost_power(boot), Event::SessionLost, "nobody has written anything");
    let used = copy.after(Event::SourceServes(boot)).unwrap();
    assert!(matches!(used.source_lost_power(boot), Event::Failed(_)), "somebody may have");
    let again = used.after(Event::Rebooted).unwrap();
    let remote = again.receiving().unwrap().remote.clone().unwrap();
    assert_eq!((remote.session, remote.served_in), (2, None), "they are gone");

    let boots = [1, 2].map(Uuid::from_u128);
    let served = Lent { served_in: Some(boots[0]), ..lent(LentStage::Fencing) };
    let rebooted = record(Phase::Lent(served)).after(Event::Rebooted).unwrap();
    assert_eq!(rebooted.lent().unwrap().stage, LentStage::Serving, "not fenced without a word");
}

/// The copy at home is the same one, with a later right to write.
#[test]
fn a_volume_that_returns_keeps_its_logical_volumes_and_gets_a_later_generation() {
    let boot = Uuid::from_u128(9);
    let away = Record { attached: true, ..record(Phase::Lent(lent(LentStage::Reclaiming))) };
    let stone = away.stone_of(&Event::Reclaimed(boot)).unwrap();
    assert_eq!(stone.fate, Fate::Returned);
    let home = away.clone().after(Event::Reclaimed(boot)).unwrap();
    assert_eq!((home.generation, home.made_in), (Generation(4), Generation(2)));
    assert!(!home.attached && home.phase == Phase::Local && home.is_confirmed(boot));
    assert_eq!(crate::plan::lv_names(&home), crate::plan::lv_names(&away));
    let old = crate::plan::dm_name(&away, crate::name::Role::Handle);
    assert_ne!(crate::plan::dm_name(&home, crate::name::Role::Handle).uuid, old.uuid);
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

#[test]
fn a_fence_is_undone_only_where_nobody_wrote_under_it() {
    for stage in [LentStage::Fencing, LentStage::Fenced] {
        let unused = Lent { session: 0, served_in: None, ..lent(stage) };
        let undone = record(Phase::Lent(unused)).after(Event::Untaken).unwrap();
        assert_eq!(undone.lent().unwrap().stage, LentStage::Revoking);
        assert_eq!(undone.after(Event::Revoked).unwrap().phase, Phase::Local);
        assert!(record(Phase::Lent(lent(stage))).after(Event::Untaken).is_err());
    }
}
