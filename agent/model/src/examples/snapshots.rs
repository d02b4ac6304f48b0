//! Copies of other copies: snapshots, what is made of them, and going back to one.

use super::*;
use crate::{
    admit::{Refusal, snapshot_template},
    plan::left_waiting,
};

fn half_made(phase: Phase) -> Record {
    let mut half = Record { data: None, attached: false, ..record(phase) };
    half.lineage.template =
        Some(Template { data: "of".into(), name: "origin".into(), moving: None });
    half
}

#[test]
fn what_is_made_of_another_is_made_while_somebody_waits_for_it_or_not_at_all() {
    let idle = Seen { data: None, meta: None, handle: None, ..bare() };
    let half = half_made(Phase::Creating);
    assert_eq!(next(&half, &idle), Next::Journal(Event::DeleteAsked));
    let asked = Seen { asked: true, ..idle.clone() };
    let of = half.lineage.template.clone();
    let steps = vec![Step::Allocate { data: SIZE.bytes(), meta: None, of }];
    assert_eq!(next(&half, &asked), Next::Allocate(steps));
    let Phase::Lent(published) = lent(LentStage::Published).phase else { panic!() };
    let passing = half_made(Phase::Lent(published));
    assert_eq!(next(&passing, &idle), Next::Journal(Event::RevokeAsked));
    let revoking = passing.after(Event::RevokeAsked).unwrap();
    assert_eq!(next(&revoking, &idle), Next::Journal(Event::Revoked));
}

#[test]
fn a_revert_removes_the_old_data_only_once_the_new_is_journalled() {
    let template = Template { data: "of".into(), name: "origin".into(), moving: None };
    let snapshot = VolumeId::new(Uuid::from_u128(8));
    let idle = Seen { handle: None, ..bare() };
    let detached = Record { attached: false, ..record(Phase::Local) };
    let asked = Event::RevertAsked { snapshot, template, size: SIZE };
    let making = detached.clone().after(asked).unwrap();
    let Next::Allocate(steps) = next(&making, &idle) else { panic!("nothing is made") };
    assert!(matches!(steps.as_slice(), [Step::Allocate { of: Some(_), .. }]), "{steps:?}");
    let (old, new) = (lv_names(&detached).0, made_lv(&making));
    assert_ne!(old, new, "both exist for a while");
    let made = Event::Allocated { data: "new".into(), meta: None };
    let retiring = making.clone().after(made).unwrap();
    assert_eq!(lv_names(&retiring).0, new);
    let step = Step::RetireData { name: old, uuid: detached.data };
    assert_eq!(next(&retiring, &idle), Next::DoThen(step, Event::Retired));
    let undoing = making.after(Event::RevertGivenUp).unwrap();
    let step = Step::RetireData { name: new, uuid: None };
    assert_eq!(next(&undoing, &idle), Next::DoThen(step, Event::Retired));
}

#[test]
fn a_deferred_snapshot_waits_for_its_readers() {
    let mut snapshot = Record { attached: false, ..record(Phase::Local) };
    let (volume, incarnation) = (snapshot.id, snapshot.incarnation);
    snapshot.lineage.taken = Some(Taken { volume, incarnation, at: 0, deferred: true });
    let idle = Seen { handle: None, ..bare() };
    let read = Seen { read: true, ..idle.clone() };
    assert_eq!(next(&snapshot, &read), Next::Wait(Wait::Readers));
    assert_eq!(next(&snapshot, &idle), Next::Journal(Event::DeleteAsked));
}

fn moving(stage: ReceivingStage) -> Record {
    let mut snapshot = Record { data: None, attached: false, ..receiving(stage) };
    let (volume, incarnation) = (snapshot.id, snapshot.incarnation);
    snapshot.lineage.taken = Some(Taken { volume, incarnation, at: 0, deferred: false });
    let moving = Moving {
        id: volume,
        generation: Generation(2),
        meta: "its meta".into(),
        grant: Uuid::from_u128(7),
        lent_in: Generation(1),
    };
    let (data, name) = ("of".to_owned(), "origin".to_owned());
    snapshot.lineage.template = Some(Template { data, name, moving: Some(moving) });
    if let Phase::Receiving(receiving) = &mut snapshot.phase {
        receiving.meta = None;
        receiving.floor = 0;
    }
    snapshot
}

#[test]
fn a_snapshot_of_what_hydrates_asks_its_source_first_and_is_never_begun_anew() {
    let import = Import::default();
    let idle = Seen { data: None, meta: None, handle: None, src: None, import, ..bare() };
    let asked = Seen { asked: true, ..idle.clone() };
    let requesting = moving(ReceivingStage::Requesting);
    assert_eq!(next(&requesting, &asked), Next::Ask(Call::Copy));
    assert_eq!(next(&requesting, &idle), Next::Journal(Event::DeleteAsked));
    let forking = requesting.after(Event::CopyGranted(export())).unwrap();
    assert_eq!(next(&forking, &idle), Next::Journal(Event::DeleteAsked));
    assert_eq!(next(&forking, &asked), Next::Wait(Wait::Request), "the volume may change");
    let steady = Seen { steady: true, ..asked.clone() };
    let Next::Allocate(steps) = next(&forking, &steady) else { panic!("nothing is made") };
    assert!(matches!(steps.as_slice(), [Step::Fork { .. }]), "{steps:?}");
    let gone = forking.clone().after(Event::DeleteAsked).unwrap();
    assert_eq!(next(&gone, &idle), Next::DoThen(Step::RetireAll, Event::Retired));
    let gone = gone.after(Event::Retired).unwrap();
    assert_eq!(next(&gone, &idle), Next::AskThenForget(Call::Release));

    // Its metadata is a copy: nothing is zeroed, and nothing counts as new.
    let made = Event::Forked { data: "data".into(), meta: "meta".into(), floor: 3 };
    let forked = forking.after(made).unwrap();
    assert_eq!(forked.lineage.template, None, "it is made");
    let there = Seen { clone: None, clone_status: None, discards_blocked: false, ..swing() };
    let Next::Do(steps) = next(&forked, &there) else { panic!("no clone is loaded") };
    assert!(matches!(steps.as_slice(), [Step::LoadClone { floor: Some(3), .. }]), "{steps:?}");
}

#[test]
fn a_copy_that_was_fenced_for_a_snapshot_is_released_when_nobody_waits_for_it() {
    let idle = Seen { data: None, meta: None, handle: None, ..bare() };
    let Phase::Lent(fenced) = lent(LentStage::Fenced).phase else { panic!() };
    let half = half_made(Phase::Lent(fenced));
    assert_eq!(next(&half, &idle), Next::Journal(Event::ReleaseAsked));
    let asked = Seen { asked: true, ..idle.clone() };
    assert!(matches!(next(&half, &asked), Next::Allocate(_)));
    let released = half.after(Event::ReleaseAsked).unwrap();
    assert_eq!(next(&released, &idle), Next::Forget(vec![Step::RetireAll]));
}

#[test]
fn a_snapshot_is_of_use_as_soon_as_all_of_it_is_here_for_good() {
    let at = |stage| Record { data: Some("data".into()), ..moving(stage) };
    for stage in [ReceivingStage::Hydrating, ReceivingStage::Collapsing] {
        let refusal = Refusal::VolumeMoving(at(stage).id);
        assert_eq!(snapshot_template(&at(stage)), Err(refusal));
    }
    assert!(snapshot_template(&at(ReceivingStage::Parting)).is_ok(), "its source may be away");
    for stage in [ReceivingStage::Requesting, ReceivingStage::Forking, ReceivingStage::Discarding] {
        let refusal = Refusal::SnapshotNotFound(at(stage).id);
        assert_eq!(snapshot_template(&at(stage)), Err(refusal));
    }
}

#[test]
fn what_a_process_has_left_waiting_goes_on_from_below_and_takes_no_discards() {
    let record = receiving(ReceivingStage::Hydrating);
    let mut seen = Seen { handle: handle(over_clone()), ..swing() };
    assert_eq!(left_waiting(&record, &seen), None, "nothing waits");
    let suspended = |device: Option<Device>| device.map(|d| Device { suspended: true, ..d });
    let (clone, handle) = (suspended(seen.clone.clone()), suspended(seen.handle.clone()));
    (seen.clone, seen.handle, seen.discards_blocked) = (clone, handle, false);
    assert_eq!(left_waiting(&record, &seen), Some(Step::Resume(Role::Clone)));
    seen.clone = swing().clone;
    let number = seen.clone.as_ref().unwrap().number;
    assert_eq!(left_waiting(&record, &seen), Some(Step::BlockDiscards(number)));
    seen.discards_blocked = true;
    assert_eq!(left_waiting(&record, &seen), Some(Step::Resume(Role::Handle)));

    // What holds writes back would let them go, and what has failed must not go on.
    let held = Seen { handle: suspended(held(SIZE)), ..seen.clone() };
    assert_eq!(left_waiting(&record, &held), None);
    let failure = Failure { why: "it is".into(), boot: boot() };
    let failed = record.after(Event::Failed(failure)).unwrap();
    assert_eq!(left_waiting(&failed, &seen), None);
    assert_eq!(left_waiting(&receiving(ReceivingStage::Held), &seen), None);
}
