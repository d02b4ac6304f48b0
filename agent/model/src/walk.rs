//! Random walks of three nodes through every call, crash, power cut and cut cable,
//! with an oracle that knows what was acknowledged. A volume may pass through a
//! node while it is still on its way there, and come back to where it was.
//!
//! What the oracle insists on, at every step: a read that succeeds anywhere
//! returns the last acknowledged value (after a power cut of the writer: one
//! acknowledged since the last flush); once a node has acknowledged a write
//! under one generation, nobody acknowledges one under an earlier generation.
//! At the end, when everything is healed: one node has the volume, all of it,
//! and the others have nothing.

mod copies;
mod seeding;
mod seeds;

use std::collections::BTreeMap;

use proptest::prelude::*;
use uuid::Uuid;

use self::{copies::Copies, seeds::Sabotage};
use crate::{
    admit::{self, Admitted, Claim, Evidence, GrantRequest, Offer, PoolRoom, Refusal},
    forget,
    name::VolumeId,
    plan::{self, Call, Next, Wait},
    seeding::{AllocationMap, SourceMap},
    sim::{FOREIGN, Fault, Io, REGION_BYTES, REGIONS, World},
    volume::{
        Borrower, Event, ExportName, Fate, LentStage, Phase, ReceivingStage, Record, Source,
        Tombstone,
    },
};

#[derive(Debug, Clone, PartialEq, Eq)]
enum Stop {
    /// The agent of this node died.
    Crash(usize),
    /// Nothing more can be done now.
    Stuck(String),
    Refused(Refusal),
}

/// Nodes of a walk.
const NODES: usize = 3;

/// Regions of a volume that has not grown.
const SMALL: usize = 2;

/// How deep a chain may be.
const MAX_DEPTH: u32 = 3;

#[derive(Debug, Default)]
struct Journal {
    /// By volume or snapshot, and generation: a volume that returns finds its old
    /// copy still there.
    copies: BTreeMap<(VolumeId, u64), Record>,
    stones: BTreeMap<Uuid, Tombstone>,
}

impl Journal {
    fn newest(&self, id: VolumeId) -> Option<&Record> {
        self.copies.range((id, 1)..=(id, u64::MAX)).next_back().map(|(_, record)| record)
    }
}

/// A copy: its node, its volume or snapshot, and its generation.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
struct At {
    node: usize,
    id: VolumeId,
    generation: u64,
}

/// What may be read of a region: the last value, and those that a power cut
/// could bring back.
#[derive(Debug, Clone)]
struct Known {
    since_flush: Vec<u64>,
    cut: bool,
    /// Given up with its source: it may be missing, and then nothing may be read.
    lost: bool,
}

#[derive(Debug)]
struct Cluster {
    world: World,
    journals: Vec<Journal>,
    id: VolumeId,
    known: Vec<Known>,
    newest: u64,
    /// Whether a caller was told that the volume is gone, or will be.
    deleted: bool,
    /// Regions that the volume has for sure.
    size: usize,
    /// Where the last write was acknowledged.
    writer: Option<usize>,
    value: u64,
    lose_answers: bool,
    /// Nodes on which a guest writes all the time.
    running: [bool; NODES],
    /// Calls between agents that were made, whether they arrived or not: any of
    /// them may arrive again, at any time.
    sent: Vec<(usize, Message)>,
    /// Snapshots and what is made of them.
    copies: Copies,
    /// What each process knows of its source's map, and how often it has asked.
    maps: BTreeMap<At, (SourceMap, u32)>,
    /// Whether questions for a map get no answer.
    silent_maps: bool,
    /// A map that is used again, on purpose.
    kept_map: Option<AllocationMap>,
    sabotage: Option<Sabotage>,
}

/// A call from one agent to another.
#[derive(Debug, Clone)]
enum Message {
    Fence(VolumeId, Claim, bool),
    Release(VolumeId, Claim),
    Revoke(Uuid),
}

fn name(node: usize) -> String {
    format!("n{node}")
}

fn number(name: &str) -> usize {
    name[1..].parse().unwrap()
}

impl Cluster {
    fn new() -> Self {
        let mut world = World::new(NODES);
        let id = VolumeId::new(world.unique());
        let copies = Copies::new(&mut world);
        let blank = Known { since_flush: vec![0], cut: false, lost: false };
        Self {
            world,
            journals: (0..NODES).map(|_| Journal::default()).collect(),
            id,
            known: vec![blank; REGIONS],
            newest: 0,
            deleted: false,
            size: SMALL,
            writer: None,
            value: 0,
            lose_answers: false,
            running: [false; NODES],
            sent: Vec::new(),
            copies,
            maps: BTreeMap::new(),
            silent_maps: false,
            kept_map: None,
            sabotage: None,
        }
    }

    fn record(&self, at: At) -> Option<Record> {
        self.journals[at.node].copies.get(&(at.id, at.generation)).cloned()
    }

    /// The copy that calls which name no generation mean.
    fn newest_at(&self, node: usize) -> Option<At> {
        let record = self.journals[node].newest(self.id)?;
        Some(At { node, id: self.id, generation: record.generation.0 })
    }

    /// The journal: it does not fail, but it may be the last thing to do.
    fn write_down(&mut self, node: usize) -> Result<(), Stop> {
        let fault = self.world.fault.take();
        let outcome = self.world.act().map_err(|_| Stop::Crash(node));
        self.world.fault = fault;
        outcome
    }

    fn put(&mut self, node: usize, record: Record) -> Result<(), Stop> {
        self.write_down(node)?;
        self.journals[node].copies.insert((record.id, record.generation.0), record);
        Ok(())
    }

    fn journal(&mut self, at: At, event: Event) -> Result<(), Stop> {
        let record = self.record(at).unwrap();
        if event == Event::Revoked {
            let lent = record.lent().unwrap();
            let stone = Tombstone {
                volume: record.id,
                incarnation: record.incarnation,
                grant: lent.to.grant,
                fate: Fate::Revoked,
            };
            self.journals[at.node].stones.insert(stone.grant, stone);
        }
        let fenced = event == Event::Fenced && at.id == self.id;
        let reverted = self.reverted(at, &record, &event);
        let after = record.after(event).expect("the planner names possible events only");
        self.put(at.node, after)?;
        if fenced {
            self.all_is_stable();
        }
        if let Some(content) = reverted {
            self.is_now(content);
        }
        Ok(())
    }

    /// Whatever was acknowledged so far must survive any power cut.
    fn all_is_stable(&mut self) {
        let lost = self.missing_for_ever();
        for (region, known) in self.known.iter_mut().enumerate() {
            if !known.cut && !known.since_flush.is_empty() {
                known.since_flush = known.since_flush.split_off(known.since_flush.len() - 1);
                known.lost = lost.contains(&region);
            }
        }
    }

    /// Regions that a node lacks which has given up its source.
    fn missing_for_ever(&self) -> Vec<usize> {
        let newest = |node: usize| self.journals[node].newest(self.id).map(|record| (node, record));
        let damaged = (0..NODES).filter_map(newest).filter(|(_, record)| record.is_damaged());
        damaged.filter_map(|(node, record)| self.world.missing(node, record)).flatten().collect()
    }

    fn forget(&mut self, at: At) -> Result<(), Stop> {
        self.write_down(at.node)?;
        let journal = &mut self.journals[at.node];
        let record = journal.copies.remove(&(at.id, at.generation)).unwrap();
        for stone in record.epitaphs() {
            journal.stones.insert(stone.grant, stone);
        }
        Ok(())
    }

    fn apply(&mut self, at: At, step: &plan::Step) -> Result<Option<Event>, Stop> {
        let record = self.record(at).unwrap();
        let outcome = self.world.apply(at.node, &record, step);
        if outcome.is_ok() {
            self.look_at_copy(at.node, &record, step);
        }
        self.hear();
        outcome.map_err(|fault| match fault {
            Fault::Crash => Stop::Crash(at.node),
            Fault::Busy => Stop::Stuck(format!("{step:?}: busy")),
            Fault::Refused(why) | Fault::Mismatch(why) => Stop::Stuck(format!("{step:?}: {why}")),
        })
    }

    /// What a swap let through was acknowledged.
    fn hear(&mut self) {
        for (node, region, value) in std::mem::take(&mut self.world.released) {
            let at = self.newest_at(node).unwrap();
            self.acknowledged(at, region, value);
        }
    }

    fn acknowledged(&mut self, at: At, region: usize, value: u64) {
        assert!(at.generation >= self.newest, "a write under an old generation was acknowledged");
        self.newest = at.generation;
        self.writer = Some(at.node);
        let known = &mut self.known[region];
        known.cut = false;
        known.since_flush.push(value);
    }

    fn converge_all(&mut self, node: usize) -> Result<(), Stop> {
        let all: Vec<_> = self.journals[node].copies.keys().copied().collect();
        let mut outcome = Ok(());
        for (id, generation) in all {
            let ended = self.converge(At { node, id, generation });
            if let Err(Stop::Crash(_)) = ended {
                return ended;
            }
            outcome = outcome.and(ended);
        }
        outcome
    }

    fn converge(&mut self, at: At) -> Result<(), Stop> {
        let node = at.node;
        let mut connecting = false;
        self.hear_of_map(at)?;
        for _ in 0..100 {
            let Some(record) = self.record(at) else { return Ok(()) };
            let map = self.map_of(at);
            let read = self.is_read(node, at.id);
            let asked = self.copies.asked;
            let there = self.world.look(node, &record);
            let seen = plan::Seen { connecting, read, asked, map, ..there };
            let next = plan::next(&record, &seen);
            if self.sabotage == Some(Sabotage::ReleasesEarly) && next == Next::Wait(Wait::Hydration)
            {
                let _ = self.release(node, &record);
            }
            let next = match self.sabotage {
                Some(sabotage) => sabotage.instead(next, &record),
                None => next,
            };
            self.sabotage_seeding(at, &record, &next)?;
            match self.seeding_all_the_same(&record, &seen, next) {
                Next::Do(steps) if plan::is_attempt(&record, &steps) => {
                    connecting = true;
                    if let Err(stop @ Stop::Crash(_)) = self.apply(at, &steps[0]) {
                        return Err(stop);
                    }
                }
                Next::Do(steps) => {
                    for step in steps {
                        self.apply(at, &step)?;
                    }
                }
                Next::DoThen(step, event) => {
                    self.apply(at, &step)?;
                    self.journal(at, event)?;
                }
                Next::Allocate(steps) => {
                    for step in steps {
                        if let Some(event) = self.apply(at, &step)? {
                            self.journal(at, event)?;
                        }
                    }
                }
                Next::JournalFloor => {
                    let Some(crate::table::CloneStatus::Working { hydrated, .. }) =
                        seen.clone_status
                    else {
                        panic!("a floor without a clone");
                    };
                    self.world.commit(node, &record);
                    self.journal(at, Event::Floor(hydrated))?;
                }
                Next::Journal(event) => self.journal(at, event)?,
                Next::Ask(call) => {
                    let event = self.ask(at, &record, call)?;
                    self.journal(at, event)?;
                }
                Next::AskForMap => self.ask_for_map(at),
                Next::AskThenForget(Call::Release) => {
                    self.release(node, &record)?;
                    self.forget(at)?;
                }
                Next::AskThenForget(_) => {
                    let source = record.receiving().unwrap().source.clone();
                    let grant = source.grant;
                    self.sent.push((number(&source.node), Message::Revoke(grant)));
                    let answer = self
                        .call(node, &source.node, |cluster, there| cluster.revoke(there, grant))?;
                    assert!(!matches!(answer, Err(Refusal::GrantFenced(_))), "fenced unasked");
                    self.forget(at)?;
                }
                Next::Wait(Wait::Pool) => {
                    self.world.activate(node);
                    if plan::next(&record, &self.world.look(node, &record))
                        == Next::Wait(Wait::Pool)
                    {
                        panic!("an LV that the journal knows is gone: {record:?}");
                    }
                }
                Next::Wait(_) | Next::Settled => return Ok(()),
                Next::Forget(steps) => {
                    for step in steps {
                        self.apply(at, &step)?;
                    }
                    self.forget(at)?;
                }
            }
        }
        panic!("acting changes nothing: {:?}", self.record(at));
    }

    /// A call to another node: it may not arrive, and its answer may be lost.
    fn call<T>(
        &mut self,
        node: usize,
        there: &str,
        call: impl FnOnce(&mut Self, usize) -> Result<T, Stop>,
    ) -> Result<Result<T, Refusal>, Stop> {
        let unreachable = || Stop::Stuck(format!("{there} does not answer {}", name(node)));
        if !self.world.network {
            return Err(unreachable());
        }
        let answer = call(self, number(there));
        if self.lose_answers {
            return Err(unreachable());
        }
        match answer {
            Ok(value) => Ok(Ok(value)),
            Err(Stop::Refused(refusal)) => Ok(Err(refusal)),
            Err(stop) => Err(stop),
        }
    }

    fn claim(record: &Record) -> Claim {
        let source = &record.receiving().unwrap().source;
        Claim {
            grant: source.grant,
            incarnation: record.incarnation,
            generation: source.generation,
        }
    }

    fn fate(journal: &Journal, grant: Uuid) -> forget::GrantFate {
        forget::fate(journal.copies.values(), journal.stones.get(&grant), grant)
    }

    fn ask(&mut self, at: At, record: &Record, call: Call) -> Result<Event, Stop> {
        let (node, id) = (at.node, at.id);
        match call {
            Call::QueryGrant => {
                let borrower = record.lent_before.clone().unwrap();
                let taken = self.call(node, &borrower.node, |cluster, there| {
                    let journal = &cluster.journals[there];
                    Ok(Self::fate(journal, borrower.grant).taken)
                })?;
                match taken {
                    Ok(false) => Ok(Event::Confirmed(self.world.nodes[node].boot)),
                    Ok(true) | Err(_) => Err(Stop::Stuck("it was taken".into())),
                }
            }
            Call::Fence => {
                let claim = Self::claim(record);
                let receiving = record.receiving().unwrap();
                let (source, forced) = (receiving.source.node.clone(), receiving.forced);
                self.sent.push((number(&source), Message::Fence(id, claim.clone(), forced)));
                let answer = self.call(node, &source, |cluster, there| {
                    cluster.fence(there, id, &claim, forced)?;
                    let at = At { node: there, id, generation: claim.generation.0 };
                    cluster
                        .record(at)
                        .map(|record| record.size)
                        .ok_or_else(|| Stop::Stuck("the source is gone".into()))
                })?;
                let length = receiving.length;
                match answer {
                    Ok(size)
                        if size > length && self.sabotage != Some(Sabotage::ForgetsTheGrowth) =>
                    {
                        Ok(Event::SourceGrew(size))
                    }
                    Ok(size) => {
                        assert!(size >= length, "the source has shrunk");
                        Ok(Event::SourceFenced)
                    }
                    Err(refusal @ Refusal::SourceActive(_)) => Err(Stop::Refused(refusal)),
                    Err(refusal) => {
                        self.journal(at, Event::SourceRefused)?;
                        Err(Stop::Stuck(refusal.to_string()))
                    }
                }
            }
            Call::Release => self.release(node, record).map(|()| Event::SourceReleased),
            Call::Revoke => unreachable!("not asked this way"),
        }
    }

    /// At the source. A guest that runs there must not be cut off unless somebody has
    /// said so.
    fn fence(
        &mut self,
        node: usize,
        id: VolumeId,
        claim: &Claim,
        forced: bool,
    ) -> Result<(), Stop> {
        let at = At { node, id, generation: claim.generation.0 };
        let is_open = |record: &Record| {
            record.lent().is_some_and(|lent| lent.hold && lent.stage == LentStage::Published)
        };
        let runs = id == self.id
            && self.running[node]
            && self.record(at).is_some_and(|r| is_open(&r) && self.world.has_handle(node, &r));
        let evidence = match runs && self.sabotage != Some(Sabotage::CutsOffTheGuest) {
            _ if forced => Evidence::Word,
            true => Evidence::Writing,
            false => Evidence::Quiet,
        };
        self.admit(at, |record| admit::fence(known(record, id)?, claim, evidence))?;
        assert!(forced || !runs, "a guest that was running was cut off");
        self.converge(at)
    }

    fn release(&mut self, node: usize, record: &Record) -> Result<(), Stop> {
        let (id, claim) = (record.id, Self::claim(record));
        let source = record.receiving().unwrap().source.node.clone();
        self.sent.push((number(&source), Message::Release(id, claim.clone())));
        let answer = self.call(node, &source, |cluster, there| {
            if cluster.journals[there].stones.contains_key(&claim.grant) {
                return Ok(());
            }
            let at = At { node: there, id, generation: claim.generation.0 };
            // What follows from it is the source's own business.
            cluster.admit(at, |record| admit::release(known(record, id)?, &claim)).map(drop)
        })?;
        match answer {
            Ok(()) | Err(Refusal::GrantUnknown(_) | Refusal::VolumeNotFound(_)) => Ok(()),
            Err(refusal) => panic!("the source refuses to let go: {refusal}"),
        }
    }

    /// A call arrives once more, however late; nobody waits for its answer.
    fn redeliver(&mut self, nth: usize) -> Result<(), Stop> {
        let Some((there, message)) = self.sent.get(nth % self.sent.len().max(1)).cloned() else {
            return Ok(());
        };
        match message {
            Message::Fence(id, claim, forced) => self.fence(there, id, &claim, forced),
            Message::Release(id, claim) => {
                if self.journals[there].stones.contains_key(&claim.grant) {
                    return Ok(());
                }
                let at = At { node: there, id, generation: claim.generation.0 };
                self.admit(at, |record| admit::release(known(record, id)?, &claim)).map(drop)
            }
            Message::Revoke(grant) => self.revoke(there, grant),
        }
    }

    fn revoke(&mut self, node: usize, grant: Uuid) -> Result<(), Stop> {
        if self.journals[node].stones.contains_key(&grant) {
            return Ok(());
        }
        let lent_under = |record: &&Record| record.lent().is_some_and(|l| l.to.grant == grant);
        let found = self.journals[node].copies.values().find(lent_under);
        let Some((id, generation)) = found.map(|record| (record.id, record.generation.0)) else {
            return Err(Stop::Refused(Refusal::GrantUnknown(grant)));
        };
        self.request(At { node, id, generation }, |record| admit::revoke(known(record, id)?, grant))
    }

    fn request(
        &mut self,
        at: At,
        admit: impl FnOnce(Option<&Record>) -> Result<Admitted, Refusal>,
    ) -> Result<(), Stop> {
        self.admit(at, admit)?;
        self.converge(at)
    }

    /// A request that names no generation.
    fn request_newest(
        &mut self,
        node: usize,
        admit: impl FnOnce(Option<&Record>) -> Result<Admitted, Refusal>,
    ) -> Result<(), Stop> {
        let at = self.newest_at(node).unwrap_or(At { node, id: self.id, generation: 1 });
        self.request(at, admit)
    }

    /// Whether the request has begun something.
    fn admit(
        &mut self,
        at: At,
        admit: impl FnOnce(Option<&Record>) -> Result<Admitted, Refusal>,
    ) -> Result<bool, Stop> {
        match admit(self.record(at).as_ref()).map_err(Stop::Refused)? {
            Admitted::Already => Ok(false),
            Admitted::Journal(record) => self.put(at.node, *record).map(|()| true),
        }
    }

    /// A request that is undone when it fails half-way, as the daemon does.
    fn undoable(
        &mut self,
        at: At,
        admit: impl FnOnce(Option<&Record>) -> Result<Admitted, Refusal>,
        event: Event,
    ) -> Result<(), Stop> {
        // A repeated request has begun nothing and undoes nothing.
        let begun = self.admit(at, admit)?;
        let outcome = self.converge(at);
        if let Err(Stop::Stuck(_)) = outcome
            && begun
            && let Some(record) = self.record(at)
            && record.after(event.clone()).is_ok()
        {
            self.journal(at, event)?;
            let _ = self.converge(at);
        }
        outcome
    }

    fn room() -> PoolRoom {
        PoolRoom {
            name: "pool".into(),
            logical_block_size: 512,
            chunk: 65536,
            free: 1 << 40,
            free_outside: 1 << 40,
        }
    }

    fn handle(&self, node: usize) -> Option<plan::Device> {
        self.world.handle(node, self.id)
    }

    fn create(&mut self, node: usize) -> Result<(), Stop> {
        let (id, incarnation) = (self.id, self.world.unique());
        let at = self.newest_at(node).unwrap_or(At { node, id: self.id, generation: 1 });
        self.undoable(
            at,
            |record| {
                let size = SMALL as u64 * REGION_BYTES;
                admit::create(record, id, size, &Self::room(), incarnation)
            },
            Event::DeleteAsked,
        )
    }

    fn extend(&mut self, node: usize, regions: usize) -> Result<(), Stop> {
        let (id, size) = (self.id, regions as u64 * REGION_BYTES);
        let at = self.newest_at(node).unwrap_or(At { node, id: self.id, generation: 1 });
        self.admit(at, |record| admit::extend(known(record, id)?, size, &Self::room()))?;
        let outcome = self.converge(at);
        if let Some(record) = self.record(at).filter(|record| record.growing.is_some()) {
            // Said back, as the daemon does.
            if let Err(Stop::Stuck(_)) = outcome {
                self.put(node, Record { growing: None, ..record })?;
            }
        }
        if outcome.is_ok() {
            self.size = self.size.max(regions);
        }
        outcome
    }

    fn delete(&mut self, node: usize) -> Result<(), Stop> {
        let (id, handle) = (self.id, self.handle(node));
        let Some(at) = self.newest_at(node) else { return Ok(()) };
        if self.let_go(at)? {
            return Ok(());
        }
        self.admit(at, |record| admit::delete(known(record, id)?, handle.as_ref()))?;
        self.deleted = true;
        self.converge(at)
    }

    /// Deletes a fenced copy that its borrower has forgotten; whether it was one.
    fn let_go(&mut self, at: At) -> Result<bool, Stop> {
        let Some(record) = self.record(at) else { return Ok(false) };
        let Some(lent) = record.lent().filter(|lent| lent.stage == LentStage::Fenced) else {
            return Ok(false);
        };
        let to = lent.to.clone();
        let released = self.sabotage == Some(Sabotage::DeletesUnasked)
            || self.call(at.node, &to.node, |cluster, there| {
                Ok(Self::fate(&cluster.journals[there], to.grant).released)
            })? == Ok(true);
        if !released {
            return Ok(false);
        }
        let id = self.id;
        self.request(at, |record| forget::delete_fenced(known(record, id)?, released))?;
        Ok(true)
    }

    fn forget_source(&mut self, node: usize) -> Result<(), Stop> {
        let Some(at) = self.newest_at(node) else { return Ok(()) };
        // A source that still answers is told rather than forgotten.
        if let stop @ Err(Stop::Crash(_)) = self.converge(at) {
            return stop;
        }
        let Some(record) = self.record(at) else { return Ok(()) };
        let seen = self.world.look(node, &record);
        let alive = forget::is_alive(&seen);
        forget::may_forget(&record, alive).map_err(Stop::Refused)?;
        let loses = forget::loses(&record);
        let missing = self.world.missing(node, &record);
        if loses && missing.is_none() {
            return Err(Stop::Stuck("no clone can tell what is here".to_owned()));
        }
        let missing = missing.unwrap_or_default();
        let mut committed = 0;
        if loses {
            let length = record.receiving().unwrap().length.bytes() / REGION_BYTES;
            committed = length - missing.len() as u64;
            if self.sabotage != Some(Sabotage::ForgetsWhatIsNotCommitted) {
                self.world.commit(node, &record);
            } else {
                committed = 0;
            }
        }
        let begun =
            self.admit(at, |record| forget::forget_source(record.unwrap(), alive, committed))?;
        if begun && loses {
            let coming = self.world.on_its_way(node, &record);
            for region in missing {
                match coming == Some(region) {
                    // It may arrive all the same.
                    true => self.known[region].lost = true,
                    false => {
                        self.known[region] = Known { since_flush: vec![], cut: false, lost: true };
                    }
                }
            }
        }
        self.converge(at)
    }

    fn attach(&mut self, node: usize, named: bool) -> Result<(), Stop> {
        let (id, handle, boot) = (self.id, self.handle(node), self.world.nodes[node].boot);
        self.request_newest(node, |record| {
            let record = known(record, id)?;
            let generation = named.then_some(record.generation);
            admit::attach(record, generation, handle.as_ref(), boot)
        })
    }

    fn detach(&mut self, node: usize) -> Result<(), Stop> {
        let (id, handle) = (self.id, self.handle(node));
        self.request_newest(node, |record| admit::detach(known(record, id)?, handle.as_ref()))
    }

    fn begin_move(&mut self, from: usize, to: usize, hold: bool) -> Result<(), Stop> {
        let (id, boot) = (self.id, self.world.nodes[from].boot);
        let grant = self.world.unique();
        let export = ExportName {
            subsystem_nqn: format!("nqn {grant}"),
            namespace_uuid: grant,
            namespace_nguid: grant,
            address: "127.0.0.1".into(),
            port: 4420,
        };
        let request = GrantRequest {
            to: Borrower { grant, node: name(to), endpoint: "https://peer".into() },
            host_nqn: "nqn host".into(),
            hold,
            export: Some(export),
            max_depth: MAX_DEPTH,
        };
        let Some(source) = self.newest_at(from) else {
            return Err(Stop::Refused(Refusal::VolumeNotFound(id)));
        };
        self.undoable(
            source,
            |record| admit::grant(known(record, id)?, request, &name(from), boot, None),
            Event::RevokeAsked,
        )?;
        let record = self.record(source).unwrap();
        self.receive(from, to, &record)
    }

    /// The second half of a move: the destination receives what the source has
    /// granted.
    fn receive(&mut self, from: usize, to: usize, record: &Record) -> Result<(), Stop> {
        let id = record.id;
        let lent = record.lent().unwrap();
        let grant = lent.to.grant;
        let depth = record.receiving().map_or(1, |receiving| receiving.source.depth + 1);
        let offer = Offer {
            id,
            incarnation: record.incarnation,
            size: record.size.bytes(),
            logical_block_size: record.logical_block_size,
            made_of: record.lineage.made_of,
            begins: record.lineage.passing,
            source: Source {
                grant,
                node: name(from),
                endpoint: "https://peer".into(),
                generation: record.generation,
                hold: lent.hold,
                depth,
                export: lent.export.clone(),
            },
        };
        let handle = self.world.handle(to, id);
        let at = At { node: to, id, generation: record.generation.next().0 };
        let elder =
            self.journals[to].newest(id).filter(|r| r.generation.0 != at.generation).cloned();
        let outcome = self.undoable(
            at,
            |record| {
                let room = Self::room();
                let (elder, handle) = (elder.as_ref(), handle.as_ref());
                admit::receive(record, elder, offer, &room, handle, &name(to), None)
            },
            Event::AbortAsked,
        );
        if let Err(Stop::Refused(_) | Stop::Stuck(_)) = outcome
            && self.record(at).is_none()
        {
            // The caller's part: a definite refusal ends the grant.
            let _ = self.revoke(from, grant);
        }
        outcome
    }

    fn switch(&mut self, node: usize, force: bool) -> Result<(), Stop> {
        let id = self.id;
        self.request_newest(node, |record| admit::switch(known(record, id)?, force))
    }

    fn abort(&mut self, node: usize) -> Result<(), Stop> {
        let id = self.id;
        let held = self.journals[node].newest(self.id).map(|r| self.world.look(node, r).held);
        self.request_newest(node, |record| admit::abort(known(record, id)?, held.unwrap_or(0)))
    }

    fn write(&mut self, node: usize, region: usize) {
        let Some(at) = self.newest_at(node) else { return };
        let record = self.record(at).unwrap();
        self.value += 1;
        let value = self.value;
        if self.world.write_handle(node, &record, region, value) == Io::Done(()) {
            self.acknowledged(at, region, value);
        }
    }

    fn flush(&mut self, node: usize) {
        let Some(record) = self.journals[node].newest(self.id).cloned() else { return };
        let outcome = match self.sabotage {
            Some(sabotage) if self.world.holds(node, &record) => match sabotage {
                Sabotage::AnswersFlushesItself => Io::Done(()),
                Sabotage::FlushesTheSourceAlone => self.world.flush_source(node, &record),
                _ => self.world.flush_handle(node, &record),
            },
            Some(_) | None => self.world.flush_handle(node, &record),
        };
        if outcome == Io::Done(()) {
            self.all_is_stable();
        }
    }

    fn read(&mut self, node: usize, region: usize) {
        let Some(record) = self.journals[node].newest(self.id).cloned() else { return };
        if let Io::Done(value) = self.world.read_handle(node, &record, region) {
            self.check(region, value);
        }
    }

    fn check(&mut self, region: usize, value: u64) {
        assert_ne!(value, FOREIGN, "another volume's past shows in region {region}");
        let known = &mut self.known[region];
        let none = known.lost && known.since_flush.is_empty();
        assert!(!none, "region {region} was lost, and yet reads {value}");
        if known.cut {
            assert!(known.since_flush.contains(&value), "region {region}: {value} of {known:?}");
            // What survived the cut is what is there from now on.
            known.since_flush = vec![value];
            known.cut = false;
            known.lost = false;
        } else {
            assert_eq!(known.since_flush.last(), Some(&value), "region {region} is stale");
        }
    }

    fn power_cut(&mut self, node: usize) {
        self.running[node] = false;
        self.world.power_cut(node);
        self.forget_maps(node);
        // What was acknowledged elsewhere is not in this node's caches.
        let writes_here = self.writer == Some(node);
        for known in &mut self.known {
            let written = known.since_flush.len() + usize::from(known.lost);
            known.cut |= writes_here && written > 1;
        }
    }

    /// Consumers write everywhere when power goes, and look at everything as soon as it
    /// is back.
    fn reboot(&mut self, node: usize) -> Result<(), Stop> {
        (0..REGIONS).for_each(|region| self.write(node, region));
        self.power_cut(node);
        let tended = self.converge_all(node);
        (0..REGIONS).for_each(|region| self.read(node, region));
        tended
    }

    fn run(&mut self, op: &Op) {
        let outcome = match *op {
            Op::Delete(node) => self.delete(node),
            Op::ForgetSource(node) => self.forget_source(node),
            // Placement is the caller's: a volume has one home, and an id one life.
            Op::Create(_) if self.deleted => Ok(()),
            Op::Create(node) => match self.homes().iter().any(|home| *home != node) {
                true => Ok(()),
                false => self.create(node),
            },
            Op::Extend(node, regions) => self.extend(node, regions),
            Op::Redeliver(nth) => self.redeliver(nth),
            Op::Attach(node, named) => self.attach(node, named),
            Op::Detach(node) => self.detach(node),
            Op::Move(from, to, hold) => self.begin_move(from, to, hold),
            Op::Switch(node, force) => self.switch(node, force),
            Op::Abort(node) => self.abort(node),
            Op::Guest(node, runs) => {
                self.running[node] = runs;
                Ok(())
            }
            Op::Tend(node) => self.converge_all(node),
            Op::Write(node, region) => {
                self.write(node, region);
                Ok(())
            }
            Op::Read(node, region) => {
                self.read(node, region);
                Ok(())
            }
            Op::Flush(node) => {
                self.flush(node);
                Ok(())
            }
            Op::Hydrate => {
                self.world.hydrate();
                Ok(())
            }
            Op::Fuse(actions) => {
                self.world.fuse = Some(actions);
                Ok(())
            }
            Op::Fault(actions) => {
                self.world.fault = Some(actions);
                Ok(())
            }
            Op::PowerCut(node) => {
                self.power_cut(node);
                Ok(())
            }
            Op::Reboot(node) => self.reboot(node),
            Op::Snapshot(node, nth) => self.snapshot(node, nth),
            Op::DropSnapshot(node, nth, defer) => self.drop_snapshot(node, nth, defer),
            Op::Make(from, to, nth, of) => self.make(from, to, nth, of),
            Op::ReadMade(node, region) => {
                self.read_made(node, region);
                Ok(())
            }
            Op::Revert(node, nth) => self.revert(node, nth),
            Op::Network(up) => {
                self.world.network = up;
                Ok(())
            }
            Op::LoseAnswers(lose) => {
                self.lose_answers = lose;
                Ok(())
            }
            Op::Users(node, users) => {
                if let Some(record) = self.journals[node].newest(self.id).cloned() {
                    self.world.set_users(node, &record, users);
                }
                Ok(())
            }
        };
        if let Err(Stop::Crash(node)) = outcome {
            self.world.fuse = None;
            self.forget_maps(node);
        }
    }

    /// The nodes that have a copy.
    fn homes(&self) -> Vec<usize> {
        (0..NODES).filter(|node| self.journals[*node].newest(self.id).is_some()).collect()
    }

    /// Everything works again; everybody has time.
    fn heal(&mut self) {
        self.world.fuse = None;
        self.world.fault = None;
        self.world.network = true;
        self.lose_answers = false;
        self.running = [false; NODES];
        for round in 0..80 {
            for node in 0..NODES {
                self.world.close_all(node);
                if let Some(record) = self.journals[node].newest(self.id).cloned() {
                    if round > 20 && record.receiving().is_some_and(|r| !r.stage.is_taken()) {
                        let _ = self.switch(node, false);
                        let _ = self.abort(node);
                    }
                    // A grant that nobody has received.
                    if round > 50
                        && let Some(lent) = record.lent()
                        && lent.stage == LentStage::Published
                        && !self.is_received(&lent.to)
                    {
                        let _ = self.abort(node);
                    }
                }
                self.end_copies(node, round);
                let _ = self.converge_all(node);
                let copies: Vec<_> = self.journals[node].copies.keys().copied().collect();
                for (id, generation) in copies {
                    let _ = self.let_go(At { node, id, generation });
                }
                if round > 40 {
                    self.rewrite_what_is_lost(node);
                }
            }
            self.world.hydrate();
        }
    }

    /// A consumer writes what it can read no more.
    fn rewrite_what_is_lost(&mut self, node: usize) {
        let Some(record) = self.journals[node].newest(self.id).cloned() else { return };
        if !record.is_damaged() || self.deleted || self.attach(node, true).is_err() {
            return;
        }
        for region in self.world.missing(node, &record).unwrap_or_default() {
            assert_eq!(self.world.read_handle(node, &record, region), Io::Failed);
            assert!(self.known[region].lost, "more is lost than was said: region {region}");
            self.write(node, region);
        }
    }

    fn is_received(&self, to: &Borrower) -> bool {
        let mut copies = self.journals[number(&to.node)].copies.values();
        copies.any(|r| r.receiving().is_some_and(|r| r.source.grant == to.grant))
    }

    fn judge(&mut self) {
        self.judge_copies();
        match self.homes().as_slice() {
            [] if self.deleted => {
                assert!((0..NODES).all(|node| self.world.is_clean(node)), "something is left");
            }
            [] => assert_eq!(self.newest, 0, "the only copy is gone"),
            homes if self.deleted => panic!("it is still at {homes:?}: {:#?}", self.journals),
            [home] => {
                assert_eq!(self.journals[*home].copies.len(), 1, "{:#?}", self.journals[*home]);
                let record = self.journals[*home].newest(self.id).cloned().unwrap();
                assert_eq!(record.phase, Phase::Local, "no way to rest");
                self.attach(*home, true).unwrap();
                for region in 0..self.size {
                    let record = self.journals[*home].newest(self.id).cloned().unwrap();
                    match self.world.read_handle(*home, &record, region) {
                        Io::Done(value) => self.check(region, value),
                        io => panic!("region {region}: {io:?}"),
                    }
                }
                for other in (0..NODES).filter(|node| node != home) {
                    self.world.close_all(other);
                    assert!(self.world.is_clean(other), "something is left at {other}");
                }
            }
            _ => panic!("several nodes have it: {:#?}", self.journals),
        }
    }
}

fn known(record: Option<&Record>, id: VolumeId) -> Result<&Record, Refusal> {
    record.ok_or(Refusal::VolumeNotFound(id))
}

#[derive(Debug, Clone)]
enum Op {
    Create(usize),
    Extend(usize, usize),
    Delete(usize),
    ForgetSource(usize),
    Redeliver(usize),
    Attach(usize, bool),
    Detach(usize),
    Move(usize, usize, bool),
    Switch(usize, bool),
    Abort(usize),
    Guest(usize, bool),
    Tend(usize),
    Write(usize, usize),
    Read(usize, usize),
    Flush(usize),
    Hydrate,
    Fuse(usize),
    Fault(usize),
    PowerCut(usize),
    Reboot(usize),
    Network(bool),
    LoseAnswers(bool),
    Users(usize, u32),
    Snapshot(usize, usize),
    DropSnapshot(usize, usize, bool),
    Make(usize, usize, usize, Option<usize>),
    ReadMade(usize, usize),
    Revert(usize, usize),
}

fn any_op() -> impl Strategy<Value = Op> {
    let node = 0usize..NODES;
    let way = (0usize..NODES, 1usize..NODES).prop_map(|(from, by)| (from, (from + by) % NODES));
    let region = 0usize..REGIONS;
    let nth = 0usize..copies::SNAPSHOTS;
    let made = (0usize..NODES, 0usize..NODES, 0usize..copies::MADE, any::<bool>(), nth.clone());
    prop_oneof![
        2 => node.clone().prop_map(Op::Create),
        1 => node.clone().prop_map(Op::Delete),
        2 => node.clone().prop_map(Op::ForgetSource),
        2 => (0usize..100).prop_map(Op::Redeliver),
        2 => (node.clone(), SMALL..=REGIONS).prop_map(|(node, to)| Op::Extend(node, to)),
        4 => (node.clone(), any::<bool>()).prop_map(|(node, named)| Op::Attach(node, named)),
        2 => node.clone().prop_map(Op::Detach),
        6 => (way, any::<bool>()).prop_map(|((from, to), hold)| Op::Move(from, to, hold)),
        4 => (node.clone(), prop::bool::weighted(0.2))
            .prop_map(|(node, force)| Op::Switch(node, force)),
        2 => (node.clone(), any::<bool>()).prop_map(|(node, runs)| Op::Guest(node, runs)),
        2 => node.clone().prop_map(Op::Abort),
        4 => node.clone().prop_map(Op::Tend),
        8 => (node.clone(), region.clone()).prop_map(|(node, region)| Op::Write(node, region)),
        8 => (node.clone(), region).prop_map(|(node, region)| Op::Read(node, region)),
        3 => node.clone().prop_map(Op::Flush),
        6 => Just(Op::Hydrate),
        4 => (0usize..40).prop_map(Op::Fuse),
        3 => (0usize..40).prop_map(Op::Fault),
        1 => node.clone().prop_map(Op::PowerCut),
        2 => node.clone().prop_map(Op::Reboot),
        3 => any::<bool>().prop_map(Op::Network),
        1 => any::<bool>().prop_map(Op::LoseAnswers),
        1 => (node.clone(), 0u32..2).prop_map(|(node, users)| Op::Users(node, users)),
        3 => (node.clone(), nth.clone()).prop_map(|(node, nth)| Op::Snapshot(node, nth)),
        2 => (node.clone(), nth.clone(), any::<bool>())
            .prop_map(|(node, nth, defer)| Op::DropSnapshot(node, nth, defer)),
        3 => made.prop_map(|(from, to, nth, whole, of)| {
            Op::Make(from, to, nth, (!whole).then_some(of))
        }),
        2 => (node.clone(), 0usize..REGIONS).prop_map(|(node, nth)| Op::ReadMade(node, nth)),
        2 => (node, nth).prop_map(|(node, nth)| Op::Revert(node, nth)),
    ]
}

/// Runs the demo's story; every action may be the last before a crash.
fn story(cluster: &mut Cluster) -> Result<(), Stop> {
    cluster.create(0)?;
    cluster.attach(0, false)?;
    for region in 0..SMALL {
        cluster.write(0, region);
    }
    cluster.flush(0);
    cluster.begin_move(0, 1, true)?;
    cluster.read(1, 0);
    cluster.write(0, 1);
    cluster.extend(0, SMALL + 1)?;
    cluster.write(0, SMALL);
    cluster.converge_all(1)?;
    cluster.read(1, SMALL);
    cluster.switch(1, false)?;
    cluster.write(1, SMALL);
    cluster.extend(1, REGIONS)?;
    cluster.read(1, REGIONS - 1);
    cluster.write(1, 0);
    cluster.flush(1);
    for _ in 0..=REGIONS {
        cluster.world.hydrate();
        cluster.converge_all(1)?;
    }
    Ok(())
}

#[test]
fn the_story_ends_well_wherever_the_process_dies() {
    for power_too in [false, true] {
        for actions in 0.. {
            let mut cluster = Cluster::new();
            cluster.world.fuse = Some(actions);
            let outcome = story(&mut cluster);
            cluster.world.fuse = None;
            if let Err(Stop::Crash(node)) = outcome {
                if power_too {
                    cluster.power_cut(node);
                }
                cluster.heal();
                cluster.judge();
                continue;
            }
            assert_eq!(outcome, Ok(()));
            // The source was told that it may go; that is its own work.
            cluster.converge_all(0).unwrap();
            assert!(actions > 50, "the story has too few actions to be the story");
            cluster.judge();
            break;
        }
    }
}

#[test]
fn a_source_that_was_fenced_stays_closed_when_it_boots() {
    let mut cluster = Cluster::new();
    cluster.create(0).unwrap();
    cluster.attach(0, false).unwrap();
    cluster.write(0, 1);
    cluster.begin_move(0, 1, true).unwrap();
    cluster.switch(1, false).unwrap();
    cluster.power_cut(0);
    cluster.converge_all(0).unwrap();
    let record = cluster.journals[0].newest(cluster.id).cloned().unwrap();
    assert!(!cluster.world.has_handle(0, &record));
    assert!(matches!(cluster.attach(0, true), Err(Stop::Refused(Refusal::VolumeFenced { .. }))));
}

#[test]
fn a_volume_that_was_once_lent_waits_for_a_word_after_a_reboot() {
    let mut cluster = Cluster::new();
    cluster.create(0).unwrap();
    cluster.attach(0, false).unwrap();
    cluster.begin_move(0, 1, true).unwrap();
    cluster.abort(1).unwrap();
    cluster.world.network = false;
    cluster.power_cut(0);
    assert!(matches!(cluster.converge_all(0), Err(Stop::Stuck(_))));
    let record = cluster.journals[0].newest(cluster.id).cloned().unwrap();
    assert!(!cluster.world.has_handle(0, &record), "nobody has confirmed anything");
    assert!(matches!(
        cluster.attach(0, false),
        Err(Stop::Refused(Refusal::ConfirmationRequired { .. }))
    ));
    cluster.world.network = true;
    cluster.converge_all(0).unwrap();
    assert!(cluster.world.has_handle(0, &record), "the borrower has answered");
}

#[test]
fn a_read_that_waits_for_a_lost_source_does_not_keep_an_abort_from_ending() {
    let mut cluster = Cluster::new();
    cluster.create(0).unwrap();
    cluster.attach(0, false).unwrap();
    cluster.begin_move(0, 1, true).unwrap();
    cluster.world.network = false;
    cluster.power_cut(1);
    // Without a controller the way to the source queues all the same.
    let _ = cluster.converge_all(1);
    cluster.world.activate(1);
    let _ = cluster.converge_all(1);
    let record = cluster.journals[1].newest(cluster.id).cloned().unwrap();
    assert_eq!(cluster.world.read_handle(1, &record, 0), Io::Waits);
    // Only the source's agent cannot be told yet.
    assert!(matches!(cluster.abort(1), Err(Stop::Stuck(why)) if why.contains("does not answer")));
    cluster.world.network = true;
    cluster.converge_all(1).unwrap();
    assert!(cluster.journals[1].copies.is_empty() && cluster.world.is_clean(1));
}

/// The handle is not opened, because a read waits for a source that is away, and has let
/// go of what it held.
fn leak(sabotage: Option<Sabotage>) {
    let mut opening = (0..40).filter_map(|action| {
        let mut cluster = Cluster::new();
        cluster.create(0).unwrap();
        cluster.attach(0, false).unwrap();
        cluster.begin_move(0, 1, true).unwrap();
        cluster.world.fault = Some(action);
        let _ = cluster.switch(1, false);
        cluster.world.fault = None;
        let record = cluster.journals[1].newest(cluster.id).cloned()?;
        let fenced = record.receiving().is_some_and(|r| r.stage == ReceivingStage::Hydrating);
        (fenced && cluster.world.holds(1, &record)).then_some((cluster, record))
    });
    let (mut cluster, record) = opening.next().unwrap();
    cluster.sabotage = sabotage;
    cluster.world.network = false;
    assert_eq!(cluster.world.read_handle(1, &record, 1), Io::Waits);
    assert!(cluster.converge_all(1).is_err());
    cluster.write(1, 0);
    assert_eq!(cluster.newest, record.generation.0, "it has held the write");
    cluster.world.network = true;
    cluster.flush(1);
    cluster.power_cut(1);
    cluster.sabotage = None;
    cluster.heal();
    cluster.judge();
}

#[test]
fn what_a_handle_acknowledges_that_failed_to_open_is_flushed_with_it() {
    leak(None);
    let told = std::panic::catch_unwind(|| leak(Some(Sabotage::FlushesTheSourceAlone)));
    assert!(told.is_err(), "a flush at the source alone goes unnoticed");
}
