//! Snapshots in the walks, and volumes that are made of them or of the volume.
//!
//! The oracle looks at each copy's logical volume when it is made: it holds what a
//! read of the volume would return at that moment. From then on it never changes,
//! wherever it is read, whatever becomes of the volume.

use std::collections::BTreeMap;

use uuid::Uuid;

use super::{At, Cluster, Known, MAX_DEPTH, NODES, Sabotage, Stop, known, name};
use crate::{
    admit::{self, GrantRequest, Made, SnapshotRequest},
    name::{Generation, VolumeId},
    plan::{self, Step},
    sim::{FOREIGN, Io, REGIONS, World},
    volume::{Borrower, Event, ExportName, LentStage, Origin, Phase, Record},
};

/// Ids of snapshots.
pub(super) const SNAPSHOTS: usize = 2;

/// Ids of volumes that are made of something.
pub(super) const MADE: usize = 2;

pub(super) type Content = [u64; REGIONS];

/// What the oracle knows of copies.
#[derive(Debug)]
pub(super) struct Copies {
    pub(super) snapshots: Vec<VolumeId>,
    made: Vec<VolumeId>,
    /// What each holds, by incarnation.
    pub(super) content: BTreeMap<Uuid, Content>,
    /// Whether a caller waits: what is made now is of this moment.
    pub(super) asked: bool,
    /// Snapshots that were taken of what was still hydrating.
    pub(super) forks: usize,
}

impl Copies {
    pub(super) fn new(world: &mut World) -> Self {
        let mut ids = |count: usize| (0..count).map(|_| VolumeId::new(world.unique())).collect();
        Self {
            snapshots: ids(SNAPSHOTS),
            made: ids(MADE),
            content: BTreeMap::new(),
            asked: false,
            forks: 0,
        }
    }
}

impl Cluster {
    pub(super) fn of_snapshot(&self, node: usize, nth: usize) -> At {
        At { node, id: self.copies.snapshots[nth], generation: Generation::SNAPSHOT.0 }
    }

    /// The newest copy of an id at a node, or where its first would be.
    fn place(&self, node: usize, id: VolumeId) -> At {
        let newest = self.journals[node].newest(id);
        At { node, id, generation: newest.map_or(1, |record| record.made_in.0) }
    }

    pub(super) fn is_read(&self, node: usize, snapshot: VolumeId) -> bool {
        self.journals[node].copies.values().any(|record| record.reads(snapshot))
    }

    /// A request during which what is made must be of this moment. What an earlier
    /// one has left half-made goes first.
    pub(super) fn asking(
        &mut self,
        at: At,
        ask: impl FnOnce(&mut Self) -> Result<(), Stop>,
    ) -> Result<(), Stop> {
        if self.record(at).is_some_and(|record| record.lineage.template.is_some()) {
            self.converge(at)?;
        }
        self.copies.asked = true;
        let outcome = ask(self);
        self.copies.asked = false;
        outcome
    }

    pub(super) fn snapshot(&mut self, node: usize, nth: usize) -> Result<(), Stop> {
        let (at, boot) = (self.of_snapshot(node, nth), self.world.nodes[node].boot);
        let (incarnation, grant) = (self.world.unique(), self.world.unique());
        let request = SnapshotRequest { id: at.id, volume: self.id, incarnation, grant, at: 0 };
        let volume = self.source_at(node);
        self.world.torn = self.sabotage == Some(Sabotage::ForksAtTwoMoments);
        self.world.uncommitted = self.sabotage == Some(Sabotage::ForksWhatIsNotCommitted);
        self.asking(at, |cluster| {
            cluster.undoable(
                at,
                |record| {
                    let room = Self::room();
                    admit::take_snapshot(record, &request, volume.as_ref(), Some(&room), boot)
                },
                Event::DeleteAsked,
            )
        })
    }

    /// The volume as admission sees it.
    fn source_at(&self, node: usize) -> Option<Record> {
        let mut volume = self.journals[node].newest(self.id).cloned()?;
        let fenced = volume.lent().is_some_and(|lent| lent.stage == LentStage::Fenced);
        if fenced && self.sabotage == Some(Sabotage::SnapshotsWhatIsFenced) {
            volume.phase = Phase::Local;
        }
        Some(volume)
    }

    pub(super) fn drop_snapshot(
        &mut self,
        node: usize,
        nth: usize,
        defer: bool,
    ) -> Result<(), Stop> {
        let at = self.of_snapshot(node, nth);
        if self.record(at).is_none() {
            return Ok(());
        }
        let journal = &self.journals[node].copies;
        let reader = journal.values().find(|record| record.reads(at.id)).map(|record| record.id);
        self.request(at, |record| admit::delete_snapshot(known(record, at.id)?, reader, defer))
    }

    /// A volume from a snapshot, or from the volume itself, there or elsewhere.
    pub(super) fn make(
        &mut self,
        from: usize,
        to: usize,
        nth: usize,
        of: Option<usize>,
    ) -> Result<(), Stop> {
        let id = self.copies.made[nth];
        // Placement is the caller's: an id has one home.
        if (0..NODES).any(|node| self.journals[node].newest(id).is_some()) {
            return Ok(());
        }
        let (at, boot) = (self.place(from, id), self.world.nodes[from].boot);
        let (origin, source) = match of {
            Some(nth) => {
                let at = self.of_snapshot(from, nth);
                (Origin::Snapshot(at.id), self.record(at))
            }
            None => (Origin::Volume(self.id), self.source_at(from)),
        };
        let (incarnation, room) = (self.world.unique(), Self::room());
        let made = Made { origin, record: source.as_ref() };
        if from == to {
            return self.asking(at, |cluster| {
                cluster.undoable(
                    at,
                    |record| admit::create_of(record, id, made, Some(&room), incarnation, boot),
                    Event::DeleteAsked,
                )
            });
        }
        let grant = self.world.unique();
        let request = GrantRequest {
            to: Borrower { grant, node: name(to), endpoint: "https://peer".into() },
            host_nqn: "nqn host".into(),
            hold: false,
            export: Some(ExportName {
                subsystem_nqn: format!("nqn {grant}"),
                namespace_uuid: grant,
                namespace_nguid: grant,
                address: "127.0.0.1".into(),
                port: 4420,
            }),
            max_depth: MAX_DEPTH,
        };
        self.asking(at, |cluster| {
            let node = name(from);
            cluster.undoable(
                at,
                |record| {
                    let room = Some(&room);
                    admit::grant_of(
                        record,
                        id,
                        made,
                        request,
                        room,
                        incarnation,
                        &node,
                        boot,
                        false,
                    )
                },
                Event::RevokeAsked,
            )
        })?;
        let record = self.record(at).unwrap();
        self.receive(from, to, &record, false)
    }

    pub(super) fn revert(&mut self, node: usize, nth: usize) -> Result<(), Stop> {
        let (of, boot) = (self.of_snapshot(node, nth), self.world.nodes[node].boot);
        let (id, handle) = (self.id, self.handle(node));
        let snapshot = self.record(of);
        let at = self.place(node, id);
        self.undoable(
            at,
            |record| {
                let (record, handle) = (known(record, id)?, handle.as_ref());
                admit::revert(record, snapshot.as_ref(), of.id, handle, boot)
            },
            Event::RevertGivenUp,
        )
    }

    /// What a logical volume holds that was just made of another.
    pub(super) fn look_at_copy(&mut self, node: usize, record: &Record, step: &Step) {
        if let Step::Fork { .. } = step {
            self.look_at_fork(node, record);
            return;
        }
        let Step::Allocate { of: Some(_), .. } = step else { return };
        let made = self.world.content(node, &plan::made_lv(record)).unwrap();
        assert!(!made.contains(&FOREIGN), "another volume's past shows in a copy");
        if let Phase::Reverting(_) = &record.phase {
            return;
        }
        // Of what was fenced, for a snapshot elsewhere that has more.
        if record.lent().is_some_and(|lent| lent.stage == LentStage::Fenced) {
            return;
        }
        if let Some(first) = self.copies.content.get(&record.incarnation) {
            assert_eq!(*first, made, "a copy that was made has changed: it is stale");
            return;
        }
        let of_volume =
            record.taken().is_some() || record.lineage.made_of == Some(Origin::Volume(self.id));
        if of_volume {
            let regions = usize::try_from(record.size.0.div_ceil(crate::sim::REGION.0)).unwrap();
            for (region, value) in made.into_iter().enumerate().take(regions) {
                self.check(region, value);
            }
        }
        if let Some(Origin::Snapshot(id)) = record.lineage.made_of {
            let of = self.record(At { node, id, generation: Generation::SNAPSHOT.0 }).unwrap();
            assert_eq!(self.copies.content[&of.incarnation], made, "what is made of it is stale");
        }
        self.copies.content.insert(record.incarnation, made);
    }

    /// What the volume holds once this event is journalled, where that is a revert.
    pub(super) fn reverted(&self, at: At, record: &Record, event: &Event) -> Option<Content> {
        let (Phase::Reverting(revert), Event::Allocated { .. }) = (&record.phase, event) else {
            return None;
        };
        let id = revert.snapshot;
        let of = self.record(At { id, generation: Generation::SNAPSHOT.0, ..at }).unwrap();
        let wanted = self.copies.content[&of.incarnation];
        let found = self.world.content(at.node, &plan::made_lv(record)).unwrap();
        assert_eq!(found, wanted, "what it was reverted to is stale");
        Some(wanted)
    }

    /// The volume holds this, on stable storage.
    pub(super) fn is_now(&mut self, content: Content) {
        for (known, value) in self.known.iter_mut().zip(content) {
            *known = Known { since_flush: vec![value], cut: false, lost: false };
        }
    }

    pub(super) fn read_made(&mut self, node: usize, region: usize) {
        self.judge_forks(node);
        for id in self.copies.made.clone() {
            let (boot, handle) = (self.world.nodes[node].boot, self.world.handle(node, id));
            let at = self.place(node, id);
            let _ = self.request(at, |record| {
                admit::attach(known(record, id)?, None, handle.as_ref(), boot)
            });
            let Some(record) = self.record(at) else { continue };
            let size = record.size.0 / crate::sim::REGION.0;
            if let Io::Done(value) = self.world.read_handle(node, &record, region)
                && (region as u64) < size
            {
                let wanted = self.copies.content[&record.incarnation][region];
                assert_eq!(value, wanted, "what was made is stale in region {region}");
            }
        }
    }

    /// Ends what nobody will go on with.
    pub(super) fn end_copies(&mut self, node: usize, round: usize) {
        for id in self.copies.made.clone() {
            let Some(record) = self.journals[node].newest(id).cloned() else { continue };
            let at = self.place(node, id);
            let lost = round > 20 && record.receiving().is_some_and(|r| !r.stage.is_taken());
            let unheard = round > 50
                && record.lent().is_some_and(|lent| {
                    lent.stage == LentStage::Published && !self.is_received(&lent.to)
                });
            if lost || unheard {
                let _ = self.request(at, |record| admit::abort(known(record, id)?, 0));
            }
        }
    }

    /// Everything made is whole and right, and goes without a trace.
    pub(super) fn judge_copies(&mut self) {
        for node in 0..NODES {
            for id in self.copies.made.clone() {
                let Some(record) = self.journals[node].newest(id).cloned() else { continue };
                assert_eq!(record.phase, Phase::Local, "no way to rest");
                self.judge_content(node, &record);
                let handle = self.world.handle(node, id);
                let at = self.place(node, id);
                self.request(at, |record| admit::detach(known(record, id)?, handle.as_ref()))
                    .unwrap();
                self.request(at, |record| admit::delete(known(record, id)?, None)).unwrap();
            }
            for nth in 0..SNAPSHOTS {
                if let Some(record) = self.record(self.of_snapshot(node, nth)) {
                    assert_eq!(record.phase, Phase::Local, "no way to rest");
                    self.judge_content(node, &record);
                    self.drop_snapshot(node, nth, false).unwrap();
                }
                assert!(self.record(self.of_snapshot(node, nth)).is_none());
            }
        }
    }

    fn judge_content(&self, node: usize, record: &Record) {
        let found = self.world.content(node, &plan::lv_names(record).0).unwrap();
        let wanted = self.copies.content[&record.incarnation];
        let regions = usize::try_from(record.size.0.div_ceil(crate::sim::REGION.0)).unwrap();
        assert_eq!(found[..regions], wanted[..regions], "a copy is stale");
    }
}

/// Everything about copies; every action may be the last before a crash.
fn story(cluster: &mut Cluster) -> Result<(), Stop> {
    cluster.create(0)?;
    cluster.attach(0, false)?;
    cluster.write(0, 0);
    cluster.flush(0);
    cluster.write(0, 1);
    cluster.snapshot(0, 0)?;
    cluster.write(0, 0);
    cluster.make(0, 0, 0, Some(0))?;
    cluster.read_made(0, 0);
    cluster.make(0, 1, 1, Some(0))?;
    cluster.read_made(1, 1);
    assert!(cluster.drop_snapshot(0, 0, false).is_err(), "it is still read");
    cluster.detach(0)?;
    cluster.revert(0, 0)?;
    cluster.extend(0, 3)?;
    cluster.drop_snapshot(0, 0, true)?;
    for _ in 0..=REGIONS {
        cluster.world.hydrate();
        cluster.converge_all(1)?;
    }
    // The last reader goes, then what it has read.
    cluster.converge_all(0)?;
    cluster.converge_all(0)?;
    assert!(cluster.record(cluster.of_snapshot(0, 0)).is_none(), "its last reader has gone");
    Ok(())
}

#[test]
fn copies_end_well_wherever_the_process_dies() {
    for power_too in [false, true] {
        for actions in 0.. {
            let mut cluster = Cluster::new();
            cluster.world.fuse = Some(actions);
            let outcome = story(&mut cluster);
            cluster.world.fuse = None;
            match outcome {
                Err(Stop::Crash(node)) if power_too => cluster.power_cut(node),
                Err(Stop::Crash(_)) => {}
                outcome => {
                    assert_eq!(outcome, Ok(()));
                    assert!(actions > 50, "the story has too few actions to be the story");
                    cluster.judge();
                    break;
                }
            }
            cluster.heal();
            cluster.judge();
        }
    }
}

#[test]
fn copies_end_well_whatever_fails() {
    for actions in 0.. {
        let mut cluster = Cluster::new();
        cluster.world.fault = Some(actions);
        let outcome = story(&mut cluster);
        let untouched = cluster.world.fault.take().is_some();
        cluster.heal();
        cluster.judge();
        if untouched {
            assert_eq!(outcome, Ok(()));
            break;
        }
    }
}
