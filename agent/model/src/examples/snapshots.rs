//! Copies of other copies: snapshots, what is made of them, and going back to one.

use super::*;

fn half_made(phase: Phase) -> Record {
    let mut half = Record { data: None, attached: false, ..record(phase) };
    half.lineage.template = Some(Template { data: "of".into(), name: "origin".into() });
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
    let template = Template { data: "of".into(), name: "origin".into() };
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
