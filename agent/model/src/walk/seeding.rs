//! What walks do with maps of what was never written.

use std::sync::Arc;

use super::{At, Cluster, Sabotage, Stop};
use crate::{
    admit::{self, Refusal},
    name::VolumeId,
    plan::{self, Next, Seen, Step, Wait},
    seeding::{AllocationMap, SourceMap},
    sim::REGION,
    volume::{Event, ReceivingStage, Record},
};

/// After so many questions without an answer everything is copied.
const PATIENCE: u32 = 2;

impl Cluster {
    /// What the process that tends a copy knows of its source's map.
    pub(super) fn map_of(&self, at: At) -> SourceMap {
        self.maps.get(&at).map(|(map, _)| map.clone()).unwrap_or_default()
    }

    /// The process of a node has died, and all that it only knew by heart.
    pub(super) fn forget_maps(&mut self, node: usize) {
        self.maps.retain(|at, _| at.node != node);
    }

    /// Begins to ask the source what was never written: the answer is there when the
    /// copy is tended again.
    pub(super) fn ask_for_map(&mut self, at: At) {
        self.maps.entry(at).or_default().0 = SourceMap::Asked;
    }

    /// The answer, if one was asked for.
    pub(super) fn hear_of_map(&mut self, at: At) -> Result<(), Stop> {
        match (self.map_of(at), self.record(at)) {
            (SourceMap::Asked, Some(record)) if record.receiving().is_some() => {
                self.fetch_map(at, &record)
            }
            (_, _) => Ok(()),
        }
    }

    fn fetch_map(&mut self, at: At, record: &Record) -> Result<(), Stop> {
        let claim = Self::claim(record);
        let (id, source) = (record.id, record.receiving().unwrap().source.node.clone());
        let asked = &mut self.maps.entry(at).or_default().1;
        *asked += 1;
        let last = *asked >= PATIENCE;
        let answer = match self.silent_maps {
            true => Err(Stop::Stuck("no answer".into())),
            false => self.call(at.node, &source, |cluster, there| {
                cluster.map_at(there, id, &claim).map_err(Stop::Refused)
            }),
        };
        let map = match answer {
            Ok(Ok(map)) => SourceMap::Known(Arc::new(self.sabotaged(map, record))),
            Ok(Err(_)) => SourceMap::Missing,
            Err(Stop::Stuck(_)) if last => SourceMap::Missing,
            Err(Stop::Stuck(_)) => return Ok(()),
            Err(stop) => return Err(stop),
        };
        self.maps.entry(at).or_default().0 = map;
        Ok(())
    }

    /// The source's answer.
    fn map_at(
        &self,
        node: usize,
        id: VolumeId,
        claim: &admit::Claim,
    ) -> Result<AllocationMap, Refusal> {
        let at = self.lent_under(node, claim.grant);
        let record = at.ok().and_then(|at| self.record(at));
        let record = record.as_ref().ok_or(Refusal::GrantUnknown(claim.grant))?;
        match (admit::allocation(record, claim), self.sabotage) {
            (Ok(()), _) => {}
            (Err(Refusal::AllocationUnknown { .. }), Some(Sabotage::MapsBeforeTheFence))
                if record.receiving().is_none() => {}
            (Err(Refusal::AllocationUnknown { .. }), Some(Sabotage::MapsARelay)) => {}
            (Err(refusal), _) => return Err(refusal),
        }
        let unwritten = self
            .world
            .allocation(node, record)
            .map_err(|fault| Refusal::AllocationUnknown { id, why: format!("{fault:?}") })?;
        Ok(AllocationMap {
            grant: claim.grant,
            incarnation: record.incarnation,
            generation: record.generation,
            length: record.size,
            region: REGION,
            unwritten,
        })
    }

    fn sabotaged(&mut self, map: AllocationMap, record: &Record) -> AllocationMap {
        if self.sabotage != Some(Sabotage::KeepsAMap) {
            return map;
        }
        // The one that leaves most out, made to fit.
        let emptier = |kept: &&AllocationMap| {
            kept.length <= map.length && kept.unwritten.regions() > map.unwritten.regions()
        };
        let unwritten = self.kept_map.as_ref().filter(emptier).unwrap_or(&map).unwritten.clone();
        let used = AllocationMap { unwritten, ..map };
        assert!(used.is_of(record), "made to fit");
        self.kept_map = Some(used.clone());
        used
    }

    /// A reboot is no reason to leave out what was never written.
    pub(super) fn seeding_all_the_same(&self, record: &Record, seen: &Seen, next: Next) -> Next {
        if self.sabotage != Some(Sabotage::SeedsAfterACut)
            || next != Next::Journal(Event::SeedingSkipped)
            || seen.clone.is_some()
        {
            return next;
        }
        let skipped = record.clone().after(Event::SeedingSkipped).unwrap();
        plan::next(&skipped, seen)
    }

    /// What is done too early, or at the wrong moment, on purpose.
    pub(super) fn sabotage_seeding(
        &mut self,
        at: At,
        record: &Record,
        next: &Next,
    ) -> Result<(), Stop> {
        match (self.sabotage, next) {
            (Some(Sabotage::MapsBeforeTheFence), Next::Wait(Wait::Switch))
                if record.receiving().is_some_and(|r| r.stage == ReceivingStage::Held)
                    && self.map_of(at) == SourceMap::Unasked =>
            {
                self.fetch_map(at, record)
            }
            (Some(Sabotage::SeedsWhileCopying), Next::DoThen(Step::Seed(_), _)) => {
                self.world.careless = true;
                Ok(())
            }
            _ => Ok(()),
        }
    }
}

/// Three nodes, one region in four written: the others are neither copied nor
/// allocated, whichever way the volume goes.
#[test]
fn what_was_never_written_is_not_copied() {
    use crate::{sim::REGIONS, table::CloneStatus, volume::Phase};
    for hold in [true, false] {
        let mut cluster = Cluster::new();
        cluster.create(0).unwrap();
        cluster.attach(0, false).unwrap();
        cluster.extend(0, REGIONS).unwrap();
        cluster.write(0, 1);
        if !hold {
            cluster.detach(0).unwrap();
        }
        cluster.begin_move(0, 1, hold).unwrap();
        if hold {
            // Written between the grant and the fence: it is in the map.
            cluster.write(0, 2);
            cluster.switch(1, false).unwrap();
        }
        cluster.converge_all(1).unwrap();
        let record = cluster.journals[1].newest(cluster.id).cloned().unwrap();
        let status = cluster.world.look(1, &record).clone_status;
        let missing = if hold { 2 } else { 1 };
        assert!(
            matches!(&status, Some(CloneStatus::Working { hydrated, total, .. })
                if *hydrated + missing == *total),
            "{status:?}"
        );
        // A region that counts as being here and was never written.
        cluster.write(1, 3);
        for _ in 0..2 * REGIONS {
            cluster.world.hydrate();
            cluster.converge_all(1).unwrap();
        }
        cluster.converge_all(0).unwrap();
        let record = cluster.journals[1].newest(cluster.id).cloned().unwrap();
        assert_eq!(record.phase, Phase::Local);
        let allocated = cluster.world.look(1, &record).allocated.unwrap();
        assert_eq!(allocated.0, (missing + 1) * REGION.0, "allocated at the end");
        cluster.judge();
    }
}

#[test]
fn a_source_that_does_not_say_what_it_has_is_copied_whole() {
    let mut cluster = Cluster::new();
    cluster.silent_maps = true;
    cluster.create(0).unwrap();
    cluster.attach(0, false).unwrap();
    cluster.begin_move(0, 1, true).unwrap();
    cluster.switch(1, false).unwrap();
    // Consumers do not wait for it.
    cluster.write(1, 0);
    assert_eq!(cluster.value, *cluster.known[0].since_flush.last().unwrap());
    for _ in 0..6 {
        cluster.world.hydrate();
        let _ = cluster.converge_all(1);
    }
    let record = cluster.journals[1].newest(cluster.id).cloned().unwrap();
    assert_eq!(record.phase, crate::volume::Phase::Local);
    let allocated = cluster.world.look(1, &record).allocated.unwrap();
    assert_eq!(allocated, record.size);
}

/// A volume that is made of a snapshot elsewhere is as sparse as that was, whatever
/// was written to what it is a snapshot of since.
#[test]
fn what_is_made_of_a_sparse_snapshot_is_as_sparse() {
    use crate::{sim::REGIONS, volume::Phase};
    let mut cluster = Cluster::new();
    cluster.create(0).unwrap();
    cluster.attach(0, false).unwrap();
    cluster.extend(0, REGIONS).unwrap();
    cluster.write(0, 2);
    cluster.snapshot(0, 0).unwrap();
    cluster.write(0, 0);
    cluster.make(0, 1, 0, Some(0)).unwrap();
    for _ in 0..2 * REGIONS {
        cluster.world.hydrate();
        cluster.converge_all(1).unwrap();
    }
    let record = cluster.journals[1].copies.values().next().cloned().unwrap();
    assert_eq!(record.phase, Phase::Local);
    assert_eq!(cluster.world.look(1, &record).allocated, Some(REGION));
    cluster.converge_all(0).unwrap();
    cluster.judge();
}

/// What was written through the export counts as written like anything else, whether
/// the volume is copied to where it is used, or comes home first and moves then.
#[test]
fn what_was_written_from_elsewhere_is_in_the_map() {
    use crate::{seeding::Seeding, sim::REGIONS, volume::Phase};
    for homeward in [false, true] {
        let mut cluster = Cluster::new();
        cluster.create(0).unwrap();
        cluster.attach(0, false).unwrap();
        cluster.extend(0, REGIONS).unwrap();
        cluster.write(0, 1);
        cluster.begin_move_to(0, 1, true, true).unwrap();
        cluster.switch(1, false).unwrap();
        cluster.write(1, 2);
        if homeward {
            cluster.detach(0).unwrap();
            cluster.detach(1).unwrap();
            cluster.converge_all(0).unwrap();
            cluster.attach(0, true).unwrap();
            cluster.begin_move(0, 1, true).unwrap();
            cluster.switch(1, false).unwrap();
        } else {
            cluster.localize(1).unwrap();
        }
        cluster.converge_all(1).unwrap();
        let record = cluster.journals[1].newest(cluster.id).cloned().unwrap();
        assert_eq!(record.receiving().unwrap().seeding, Seeding::Done, "{record:?}");
        assert_eq!(cluster.world.missing(1, &record), Some(vec![1, 2]));
        for _ in 0..2 * REGIONS {
            cluster.world.hydrate();
            cluster.converge_all(1).unwrap();
        }
        cluster.converge_all(0).unwrap();
        let record = cluster.journals[1].newest(cluster.id).cloned().unwrap();
        assert_eq!(record.phase, Phase::Local);
        let allocated = cluster.world.look(1, &record).allocated.unwrap();
        assert_eq!(allocated.0, 2 * REGION.0);
        cluster.judge();
    }
}
