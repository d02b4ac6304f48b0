//! Snapshots of what is still hydrating.
//!
//! The oracle looks at each when it is taken: what it has of its own, and what the
//! source has made for it, together are what a read of the volume would return at that
//! moment. What it has of its own never changes, and in the end it has all of it.

use super::{At, Cluster, Message, Sabotage, Stop, copies::Content, name, number};
use crate::{
    admit::{self, Claim, Refusal},
    name::Generation,
    plan,
    sim::{REGION, REGIONS},
    volume::{Event, ExportName, Record},
};

impl Cluster {
    /// A snapshot of what is still hydrating asks the volume's source for a copy of what
    /// it lacks.
    pub(super) fn ask_for_copy(&mut self, at: At, record: &Record) -> Result<Event, Stop> {
        let request = admit::CopyRequest::of(record).unwrap();
        let grant = request.grant;
        let source = record.receiving().unwrap().source.node.clone();
        self.sent.push((number(&source), Message::Copy(request.clone(), at.node)));
        let answer = self.call(at.node, &source, |cluster, there| {
            cluster.copy_for(there, &request, at.node)?;
            let lent = cluster.lent_under(there, grant)?;
            Ok(cluster.record(lent).unwrap())
        })?;
        let copy = answer.map_err(|refusal| Stop::Stuck(refusal.to_string()))?;
        assert_eq!(copy.size, record.receiving().unwrap().length, "the source has another size");
        Ok(Event::CopyGranted(copy.lent().unwrap().export.clone()))
    }

    /// At the source. The answer is the deed.
    pub(super) fn copy_for(
        &mut self,
        node: usize,
        request: &admit::CopyRequest,
        caller: usize,
    ) -> Result<(), Stop> {
        let at = At { node, id: request.id, generation: Generation::FIRST.0 };
        let export = ExportName { port: 4420, ..ExportName::unknown(self.world.unique()) };
        let volume = self.lent_under(node, request.claim.grant).ok();
        let volume = volume.and_then(|at| self.record(at));
        let spent = self.journals[node].stones.get(&request.grant).cloned();
        let asked = self.copies.asked;
        let outcome = self.asking(at, |cluster| {
            cluster.undoable(
                at,
                |record| {
                    let (caller, room) = (name(caller), Self::room());
                    let (volume, spent) = (volume.as_ref(), spent.as_ref());
                    let export = Some(export);
                    admit::grant_copy(
                        record,
                        request,
                        volume,
                        Some(&caller),
                        export,
                        Some(&room),
                        spent,
                    )
                },
                Event::ReleaseAsked,
            )
        });
        self.copies.asked = asked;
        outcome
    }

    /// Whoever needs a grant no more that was never given may still have asked for it.
    pub(super) fn never_granted(&mut self, node: usize, claim: &Claim) {
        let stone = admit::never_granted(self.id, claim);
        self.journals[node].stones.entry(claim.grant).or_insert(stone);
    }

    /// What was taken of a volume that hydrated: what the snapshot reads at this moment,
    /// before it has copied anything.
    pub(super) fn look_at_fork(&mut self, node: usize, record: &Record) {
        let here = self.world.here(node, record).unwrap();
        let source = &record.receiving().unwrap().source;
        let there = self.lent_under(number(&source.node), source.grant).unwrap();
        let there = (there.node, plan::lv_names(&self.record(there).unwrap()).0);
        let there = self.world.content(there.0, &there.1).unwrap();
        let regions = usize::try_from(record.size.0.div_ceil(REGION.0)).unwrap();
        let content: Content = std::array::from_fn(|region| here[region].unwrap_or(there[region]));
        for (region, value) in content.into_iter().enumerate().take(regions) {
            self.check(region, value);
        }
        self.copies.forks += 1;
        self.copies.content.insert(record.incarnation, content);
    }

    /// What a snapshot has of its own never changes, whether it is whole or not.
    pub(super) fn judge_forks(&self, node: usize) {
        for id in &self.copies.snapshots {
            let Some(record) =
                self.record(At { node, id: *id, generation: Generation::SNAPSHOT.0 })
            else {
                continue;
            };
            let Some(wanted) = self.copies.content.get(&record.incarnation) else { continue };
            for (region, value) in self.world.here(node, &record).into_iter().flatten().enumerate()
            {
                let regions = record.size.0 / REGION.0;
                if let Some(value) = value.filter(|_| (region as u64) < regions) {
                    assert_eq!(value, wanted[region], "a snapshot is stale in region {region}");
                }
            }
        }
    }
}

/// Everything about a snapshot of a volume that is still hydrating.
fn forked_story(cluster: &mut Cluster) -> Result<(), Stop> {
    cluster.create(0)?;
    cluster.attach(0, false)?;
    for region in 0..super::SMALL {
        cluster.write(0, region);
    }
    cluster.flush(0);
    cluster.begin_move(0, 1, true)?;
    cluster.switch(1, false)?;
    cluster.extend(1, 3)?;
    cluster.write(1, 1);
    cluster.write(1, 2);
    cluster.snapshot(1, 0)?;
    cluster.write(1, 1);
    cluster.write(1, 2);
    let refusal = Refusal::VolumeMoving(cluster.of_snapshot(1, 0).id);
    assert_eq!(cluster.make(1, 1, 0, Some(0)), Err(Stop::Refused(refusal)));
    cluster.converge_all(1)?;
    cluster.world.hydrate();
    cluster.snapshot(1, 1)?;
    cluster.drop_snapshot(1, 1, false)?;
    cluster.write(1, 0);
    cluster.read(1, 1);
    for _ in 0..=2 * REGIONS {
        cluster.world.hydrate();
        cluster.converge_all(1)?;
        cluster.read_made(1, 0);
    }
    cluster.converge_all(0)?;
    cluster.make(1, 1, 0, Some(0))?;
    cluster.read_made(1, 0);
    Ok(())
}

#[test]
fn snapshots_of_what_is_still_hydrating_end_well_wherever_the_process_dies() {
    for power_too in [false, true] {
        for actions in 0.. {
            let mut cluster = Cluster::new();
            cluster.world.fuse = Some(actions);
            let outcome = forked_story(&mut cluster);
            cluster.world.fuse = None;
            match outcome {
                Err(Stop::Crash(node)) if power_too => cluster.power_cut(node),
                Err(Stop::Crash(_)) => {}
                outcome => {
                    assert_eq!(outcome, Ok(()));
                    assert!(actions > 80, "the story has too few actions to be the story");
                    assert_eq!(cluster.copies.forks, 2);
                    cluster.heal();
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
fn snapshots_of_what_is_still_hydrating_end_well_whatever_fails() {
    for actions in 0.. {
        let mut cluster = Cluster::new();
        cluster.world.fault = Some(actions);
        let outcome = forked_story(&mut cluster);
        let untouched = cluster.world.fault.take().is_some();
        cluster.heal();
        cluster.judge();
        if untouched {
            assert_eq!(outcome, Ok(()));
            break;
        }
    }
}

/// Nothing else shows that the metadata and the data are of one moment.
#[test]
fn a_snapshot_of_two_moments_shows() {
    for sabotage in [Sabotage::ForksAtTwoMoments, Sabotage::ForksWhatIsNotCommitted] {
        let told = std::panic::catch_unwind(|| {
            let mut cluster = Cluster::new();
            cluster.sabotage = Some(sabotage);
            let _ = forked_story(&mut cluster);
        });
        let why = told.expect_err("it went unnoticed");
        let why = why.downcast_ref::<String>().cloned().unwrap_or_default();
        assert!(why.contains("is stale"), "{sabotage:?}: {why}");
    }
}
