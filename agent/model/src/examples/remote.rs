//! Volumes that are used here and are elsewhere.

use super::*;
use crate::volume::Remote;

fn remote(stage: ReceivingStage, served_in: Option<Uuid>) -> Record {
    let mut record = receiving(stage);
    if let Phase::Receiving(receiving) = &mut record.phase {
        receiving.remote = Some(Remote { session: 1, served_in, stays: false });
    }
    record
}

fn served(stage: LentStage, served_in: Option<Uuid>) -> Record {
    let mut record = lent(stage);
    if let Phase::Lent(lent) = &mut record.phase {
        (lent.session, lent.served_in) = (1, served_in);
    }
    record
}

fn way() -> Target {
    Target::WritableQueue { path: Some(NAMESPACE) }
}

fn through() -> Target {
    Target::Linear { device: SRC, offset: Sectors(0) }
}

/// A way to the source, without a clone.
fn linked() -> Seen {
    Seen { src: Some(device(SRC, way())), ..bare() }
}

fn another_boot() -> Option<Uuid> {
    Some(Uuid::from_u128(77))
}

#[test]
fn nothing_is_written_at_a_source_that_has_not_answered() {
    let hold = Table::held(SIZE, SRC, SRC, Sectors(1));
    let held = Next::Do(vec![Step::Set(Role::Handle, hold.clone())]);
    for stage in [ReceivingStage::Held, ReceivingStage::Switching, ReceivingStage::Remote] {
        assert_eq!(next(&remote(stage, None), &linked()), held, "{stage:?}");
    }
    let holding = Seen { handle: with_table(hold), ..linked() };
    let asked = next(&remote(ReceivingStage::Switching, None), &holding);
    assert_eq!(asked, Next::Ask(Call::Serve));
    let answered = next(&remote(ReceivingStage::Remote, Some(boot())), &holding);
    assert_eq!(answered, Next::Do(vec![Step::OpenHandle(table(through()))]));
}

#[test]
fn consumers_of_an_earlier_boot_are_another_session() {
    for stage in [ReceivingStage::Remote, ReceivingStage::Building, ReceivingStage::Settling] {
        let before = remote(stage, another_boot());
        assert_eq!(next(&before, &linked()), Next::Journal(Event::Rebooted), "{stage:?}");
    }
}

#[test]
fn a_source_that_does_not_answer_is_asked_whether_it_lost_power() {
    let used = remote(ReceivingStage::Remote, Some(boot()));
    let there = Seen { handle: handle(through()), ..linked() };
    assert_eq!(next(&used, &there), Next::Wait(Wait::Remote));
    let import = Import { live: false, ..there.import };
    let away = Seen { import, ..there };
    assert_eq!(next(&used, &away), Next::Ask(Call::Serve));
}

#[test]
fn an_export_takes_writes_only_of_the_session_that_is_served() {
    let writable = table(Target::Linear { device: DATA, offset: Sectors(0) });
    let refusing = table(Target::ReadOnly { device: DATA, offset: Sectors(0) });
    let export = |record: &Record, seen: &Seen| match next(record, seen) {
        Next::Do(steps) => steps,
        next => panic!("{next:?}"),
    };
    let seen = Seen { handle: None, ..bare() };
    let set = |table: &Table| [Step::Set(Role::Export, table.clone())];
    assert_eq!(export(&served(LentStage::Yielding, Some(boot())), &seen), set(&refusing));
    assert_eq!(export(&served(LentStage::Serving, Some(boot())), &seen), set(&writable));
    assert_eq!(export(&served(LentStage::Fencing, Some(boot())), &seen), set(&refusing));

    let open =
        Seen { handle: handle(Target::Linear { device: DATA, offset: Sectors(0) }), ..bare() };
    let closed = [Step::FenceHandle(table(Target::Error))];
    assert_eq!(export(&served(LentStage::Yielding, Some(boot())), &open), closed);
    assert_eq!(export(&served(LentStage::Serving, Some(boot())), &open), closed);

    // In a later boot nothing is opened, and nothing is called fenced, unasked.
    let later = served(LentStage::Serving, another_boot());
    assert_eq!(next(&later, &seen), Next::Wait(Wait::Peer));
    let fencing = served(LentStage::Fencing, another_boot());
    assert_eq!(next(&fencing, &seen), Next::Journal(Event::Rebooted));
}

#[test]
fn a_copy_is_begun_only_when_the_source_takes_no_writes() {
    let settling = remote(ReceivingStage::Settling, Some(boot()));
    let running = Seen { handle: handle(through()), src: Some(device(SRC, way())), ..swing() };
    assert_eq!(
        next(&settling, &running),
        Next::Do(vec![Step::Set(Role::Handle, holding(SIZE))]),
        "the handle first, while the way still takes what is on it"
    );
    let held = Seen { handle: held(SIZE), ..running };
    let closed = table(Target::Queue { path: Some(NAMESPACE) });
    assert_eq!(next(&settling, &held), Next::Do(vec![Step::Set(Role::Src, closed)]));
    let waiting = Seen { src: swing().src, ..held };
    assert_eq!(next(&settling, &waiting), Next::Ask(Call::Fence));
    let answered = settling.after(Event::SourceFenced).unwrap();
    assert_eq!(next(&answered, &waiting), Next::Do(vec![Step::OpenHandle(table(over_clone()))]));
}

#[test]
fn a_source_opens_again_only_when_its_export_is_gone() {
    let reclaiming = served(LentStage::Reclaiming, Some(boot()));
    let writable = Target::Linear { device: DATA, offset: Sectors(0) };
    let serving = Seen {
        handle: None,
        export: Some(device(SRC, writable)),
        published: Presence::Complete,
        ..bare()
    };
    assert!(matches!(next(&reclaiming, &serving), Next::Do(steps)
        if matches!(steps.as_slice(), [Step::Unpublish { .. }])));
    let unpublished = Seen { published: Presence::Absent, ..serving };
    assert_eq!(next(&reclaiming, &unpublished), Next::Do(vec![Step::Remove(Role::Export)]));
    let gone = Seen { export: None, ..unpublished };
    assert_eq!(next(&reclaiming, &gone), Next::DoThen(Step::Flush(DATA), Event::Reclaimed(boot())));
}

#[test]
fn what_nobody_uses_goes_home() {
    let detached = Record { attached: false, ..remote(ReceivingStage::Remote, Some(boot())) };
    let open = Seen { handle: handle(through()), ..linked() };
    assert_eq!(next(&detached, &open), Next::Do(vec![Step::Remove(Role::Handle)]));
    assert_eq!(next(&detached, &linked()), Next::Journal(Event::ReturnAsked));
    let returning = Record { pool: String::new(), ..remote(ReceivingStage::Returning, None) };
    assert!(matches!(next(&returning, &linked()), Next::Do(steps)
        if matches!(steps.as_slice(), [Step::CutSource(_)])));
    let bare = Seen { import: Import::default(), ..bare() };
    assert_eq!(next(&returning, &bare), Next::AskThenForget(Call::Return));
}
