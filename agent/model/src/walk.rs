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
mod forks;
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
    table::Target,
    units::Sectors,
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
    /// A node whose consumers had written, and not flushed, what a power cut elsewhere
    /// may have taken, and have not been stopped.
    deceived: Option<usize>,
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
    Fence(Claim, bool),
    Release(Claim),
    Revoke(Uuid, bool),
    Serve(Claim, bool),
    Return(Claim),
    Copy(admit::CopyRequest, usize),
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
            deceived: None,
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
        Some(At { node, id: self.id, generation: record.made_in.0 })
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
        self.journals[node].copies.insert((record.id, record.made_in.0), record);
        Ok(())
    }

    fn journal(&mut self, at: At, event: Event) -> Result<(), Stop> {
        let record = self.record(at).unwrap();
        if let Some(stone) = record.stone_of(&event) {
            self.journals[at.node].stones.insert(stone.grant, stone);
        }
        let fenced = matches!(event, Event::Fenced | Event::Reclaimed(_)) && at.id == self.id;
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
            let at = self.newest_at(node);
            let at = at.expect("a late write under an old generation was done");
            self.acknowledged(at, region, value);
        }
    }

    fn acknowledged(&mut self, at: At, region: usize, value: u64) {
        let generation = self.record(at).unwrap().generation.0;
        assert!(generation >= self.newest, "a write under an old generation was acknowledged");
        self.newest = generation;
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
            let seen = plan::Seen { connecting, read, asked, steady: asked, map, ..there };
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
                    if record.clone().after(event.clone()).as_ref() == Ok(&record) {
                        return Ok(());
                    }
                    self.journal(at, event)?;
                }
                Next::AskForMap => self.ask_for_map(at),
                Next::AskThenForget(Call::Return) => {
                    let claim = Self::claim(&record);
                    let source = record.receiving().unwrap().source.node.clone();
                    self.sent.push((number(&source), Message::Return(claim.clone())));
                    let answer =
                        self.call(node, &source, |cluster, there| cluster.reclaim(there, &claim))?;
                    if let Err(refusal) = answer {
                        panic!("the source does not take it back: {refusal}");
                    }
                    self.forget(at)?;
                }
                Next::AskThenForget(Call::Release) => {
                    self.release(node, &record)?;
                    self.forget(at)?;
                }
                Next::AskThenForget(_) => {
                    let source = record.receiving().unwrap().source.clone();
                    let grant = source.grant;
                    self.sent.push((number(&source.node), Message::Revoke(grant, true)));
                    let answer = self.call(node, &source.node, |cluster, there| {
                        cluster.revoke(there, grant, true)
                    })?;
                    assert!(!matches!(answer, Err(Refusal::GrantFenced(_))), "fenced for good");
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
            session: record
                .receiving()
                .and_then(|receiving| receiving.remote.as_ref())
                .map_or(0, |remote| remote.session),
        }
    }

    fn fate(journal: &Journal, grant: Uuid) -> forget::GrantFate {
        forget::fate(journal.copies.values(), journal.stones.get(&grant), grant)
    }

    fn ask(&mut self, at: At, record: &Record, call: Call) -> Result<Event, Stop> {
        let node = at.node;
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
                self.sent.push((number(&source), Message::Fence(claim.clone(), forced)));
                let answer = self.call(node, &source, |cluster, there| {
                    cluster.fence(there, &claim, forced)?;
                    cluster.size_under(there, claim.grant)
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
                    Err(Refusal::SessionStale(_)) => Ok(self.source_lost_power(node, record)),
                    Err(Refusal::GrantReturned(_)) => Ok(Event::ReturnAsked),
                    Err(refusal) => {
                        self.journal(at, Event::SourceRefused)?;
                        Err(Stop::Stuck(refusal.to_string()))
                    }
                }
            }
            Call::Serve => {
                let claim = Self::claim(record);
                let receiving = record.receiving().unwrap();
                let (source, forced) = (receiving.source.node.clone(), receiving.forced);
                self.sent.push((number(&source), Message::Serve(claim.clone(), forced)));
                let answer = self.call(node, &source, |cluster, there| {
                    cluster.serve(there, &claim, forced)?;
                    cluster.size_under(there, claim.grant)
                })?;
                let length = receiving.length;
                match answer {
                    Ok(size)
                        if size > length && self.sabotage != Some(Sabotage::ForgetsTheGrowth) =>
                    {
                        Ok(Event::SourceGrew(size))
                    }
                    Ok(_) => Ok(Event::SourceServes(self.world.nodes[node].boot)),
                    Err(refusal @ Refusal::SourceActive(_)) => Err(Stop::Refused(refusal)),
                    Err(Refusal::SessionStale(_)) => Ok(self.source_lost_power(node, record)),
                    Err(Refusal::GrantReturned(_)) => Ok(Event::ReturnAsked),
                    Err(refusal) => {
                        self.journal(at, Event::SourceRefused)?;
                        Err(Stop::Stuck(refusal.to_string()))
                    }
                }
            }
            Call::Release => self.release(node, record).map(|()| Event::SourceReleased),
            Call::Copy => self.ask_for_copy(at, record),
            Call::Return | Call::Revoke => unreachable!("not asked this way"),
        }
    }

    fn release(&mut self, node: usize, record: &Record) -> Result<(), Stop> {
        let claim = Self::claim(record);
        let source = record.receiving().unwrap().source.node.clone();
        self.sent.push((number(&source), Message::Release(claim.clone())));
        let answer =
            self.call(node, &source, |cluster, there| cluster.told_to_release(there, &claim))?;
        match answer {
            Ok(()) | Err(Refusal::GrantUnknown(_) | Refusal::VolumeNotFound(_)) => Ok(()),
            Err(refusal) => panic!("the source refuses to let go: {refusal}"),
        }
    }

    fn source_lost_power(&self, node: usize, record: &Record) -> Event {
        if self.sabotage == Some(Sabotage::GoesOnWithoutItsSource) {
            return Event::SessionLost;
        }
        record.source_lost_power(self.world.nodes[node].boot)
    }

    /// Asks what is lent by a grant; the copy may have another generation by now.
    fn of_grant(
        &mut self,
        node: usize,
        claim: &Claim,
        admit: impl FnOnce(&Record) -> Result<Admitted, Refusal>,
    ) -> Result<(), Stop> {
        let at = self.lent_under(node, claim.grant)?;
        self.request(at, |record| admit(known(record, at.id)?))
    }

    fn lent_under(&self, node: usize, grant: Uuid) -> Result<At, Stop> {
        let lent_under = |r: &&Record| r.lent().is_some_and(|l| l.to.grant == grant);
        let found = self.journals[node].copies.values().find(lent_under);
        let at = found.map(|record| At { node, id: record.id, generation: record.made_in.0 });
        at.ok_or(Stop::Refused(Refusal::GrantUnknown(grant)))
    }

    fn size_under(&self, node: usize, grant: Uuid) -> Result<Sectors, Stop> {
        let at = self.lent_under(node, grant)?;
        self.record(at).map(|record| record.size).ok_or(Stop::Stuck("the source is gone".into()))
    }

    /// What follows from it is the source's own business.
    fn told_to_release(&mut self, node: usize, claim: &Claim) -> Result<(), Stop> {
        if self.journals[node].stones.contains_key(&claim.grant) {
            return Ok(());
        }
        let at = match self.lent_under(node, claim.grant) {
            Err(refused) => {
                self.never_granted(node, claim);
                return Err(refused);
            }
            Ok(at) => at,
        };
        self.admit(at, |record| admit::release(known(record, at.id)?, claim)).map(drop)
    }

    fn fence(&mut self, node: usize, claim: &Claim, forced: bool) -> Result<(), Stop> {
        let closed = self.close(node, claim, forced, LentStage::Fenced, admit::fence);
        closed.map_err(|stop| self.of_what_is_over(node, claim, stop))
    }

    fn serve(&mut self, node: usize, claim: &Claim, forced: bool) -> Result<(), Stop> {
        let closed = self.close(node, claim, forced, LentStage::Serving, admit::serve);
        closed.map_err(|stop| self.of_what_is_over(node, claim, stop))
    }

    fn of_what_is_over(&self, node: usize, claim: &Claim, stop: Stop) -> Stop {
        let Stop::Refused(refusal) = stop else { return stop };
        let stone = self.journals[node].stones.get(&claim.grant);
        Stop::Refused(admit::of_what_is_over(refusal, stone))
    }

    /// At the source. A guest that runs there must not be cut off unless somebody has
    /// said so.
    fn close(
        &mut self,
        node: usize,
        claim: &Claim,
        forced: bool,
        stage: LentStage,
        admit: impl FnOnce(&Record, &Claim, Evidence, Uuid) -> Result<Admitted, Refusal>,
    ) -> Result<(), Stop> {
        let (at, boot) = (self.lent_under(node, claim.grant)?, self.world.nodes[node].boot);
        let is_open = |record: &Record| {
            record.lent().is_some_and(|lent| lent.hold && lent.stage == LentStage::Published)
        };
        let runs = at.id == self.id
            && self.running[node]
            && self.record(at).is_some_and(|r| is_open(&r) && self.world.has_handle(node, &r));
        let evidence = match runs && self.sabotage != Some(Sabotage::CutsOffTheGuest) {
            _ if forced => Evidence::Word,
            true => Evidence::Writing,
            false => Evidence::Quiet,
        };
        self.admit(at, |record| admit(known(record, at.id)?, claim, evidence, boot))?;
        assert!(forced || !runs, "a guest that was running was cut off");
        self.converge(at)?;
        self.is_at(node, claim, stage)
    }

    /// The answer is the deed.
    fn is_at(&self, node: usize, claim: &Claim, stage: LentStage) -> Result<(), Stop> {
        let mut lent = self.journals[node].copies.values().filter_map(Record::lent);
        match lent.find(|lent| lent.to.grant == claim.grant) {
            Some(lent) if lent.stage == stage => Ok(()),
            lent => Err(Stop::Stuck(format!("not {stage:?}: {lent:?}"))),
        }
    }

    fn reclaim(&mut self, node: usize, claim: &Claim) -> Result<(), Stop> {
        let stone = self.journals[node].stones.get(&claim.grant);
        if stone.is_some_and(|stone| stone.fate == Fate::Returned) {
            return Ok(());
        }
        let boot = self.world.nodes[node].boot;
        self.of_grant(node, claim, |record| admit::reclaim(record, claim, boot))
    }

    /// Somebody says that whoever uses the volume elsewhere is gone, true or not.
    fn take_back(&mut self, node: usize) -> Result<(), Stop> {
        let records = self.journals[node].copies.values().filter(|record| record.id == self.id);
        let mut claims = records.filter_map(|record| {
            let grant = record.lent()?.to.grant;
            let (incarnation, generation) = (record.incarnation, record.generation);
            Some(Claim { grant, incarnation, generation, session: 0 })
        });
        match claims.next_back() {
            Some(claim) => self.reclaim(node, &claim),
            None => Ok(()),
        }
    }

    /// A call arrives once more, however late; nobody waits for its answer.
    fn redeliver(&mut self, nth: usize) -> Result<(), Stop> {
        let Some((there, message)) = self.sent.get(nth % self.sent.len().max(1)).cloned() else {
            return Ok(());
        };
        match message {
            Message::Fence(claim, forced) => self.fence(there, &claim, forced),
            Message::Serve(claim, forced) => self.serve(there, &claim, forced),
            Message::Return(claim) => self.reclaim(there, &claim),
            Message::Release(claim) => self.told_to_release(there, &claim),
            Message::Revoke(grant, by_borrower) => self.revoke(there, grant, by_borrower),
            Message::Copy(request, from) => self.copy_for(there, &request, from),
        }
    }

    fn revoke(&mut self, node: usize, grant: Uuid, by_borrower: bool) -> Result<(), Stop> {
        if self.journals[node].stones.contains_key(&grant) {
            return Ok(());
        }
        let at = self.lent_under(node, grant)?;
        self.request(at, |record| admit::revoke(known(record, at.id)?, grant, by_borrower))
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
        self.begin_move_to(from, to, hold, false)
    }

    fn begin_move_to(
        &mut self,
        from: usize,
        to: usize,
        hold: bool,
        remote: bool,
    ) -> Result<(), Stop> {
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
        self.receive(from, to, &record, remote)
    }

    /// The second half of a move: the destination receives what the source has
    /// granted.
    fn receive(
        &mut self,
        from: usize,
        to: usize,
        record: &Record,
        remote: bool,
    ) -> Result<(), Stop> {
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
        let elder = self.journals[to].newest(id).filter(|r| r.made_in.0 != at.generation).cloned();
        let outcome = self.undoable(
            at,
            |record| {
                let room = Self::room();
                let (elder, handle) = (elder.as_ref(), handle.as_ref());
                if remote {
                    let to = name(to);
                    return admit::receive_remote(record, elder, offer, true, handle, &to, None);
                }
                admit::receive(record, elder, offer, &room, handle, &name(to), None)
            },
            Event::AbortAsked,
        );
        if let Err(Stop::Refused(_) | Stop::Stuck(_)) = outcome
            && self.record(at).is_none()
        {
            // The caller's part: a definite refusal ends the grant.
            let _ = self.revoke(from, grant, false);
        }
        outcome
    }

    fn localize(&mut self, node: usize) -> Result<(), Stop> {
        let id = self.id;
        let at = self.newest_at(node).unwrap_or(At { node, id, generation: 1 });
        self.undoable(
            at,
            |record| admit::localize(known(record, id)?, &Self::room(), None),
            Event::LocalizeDropped,
        )
    }

    fn switch(&mut self, node: usize, force: bool) -> Result<(), Stop> {
        let id = self.id;
        self.request_newest(node, |record| admit::switch(known(record, id)?, force))
    }

    fn abort(&mut self, node: usize) -> Result<(), Stop> {
        let id = self.id;
        let held = self.journals[node].newest(self.id).map(|r| self.world.look(node, r).held);
        let lent = self.journals[node].newest(self.id).and_then(Record::lent);
        let given_up = match lent.filter(|lent| lent.stage == LentStage::Fenced) {
            Some(lent) => {
                let to = lent.to.clone();
                let told = self.call(node, &to.node, |cluster, there| {
                    Ok(Self::fate(&cluster.journals[there], to.grant).given_up)
                })?;
                told == Ok(true) || self.sabotage == Some(Sabotage::UndoesAnyFence)
            }
            None => false,
        };
        self.request_newest(node, |record| {
            admit::abort_told(known(record, id)?, held.unwrap_or(0), given_up)
        })
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
            assert_ne!(
                self.deceived,
                Some(node),
                "a flush was acknowledged of what a power cut had taken"
            );
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
        if self.deceived == Some(node) {
            self.deceived = None;
        }
        // What was acknowledged elsewhere is not in this node's caches, unless it was
        // written here from there.
        let Some(writer) = self.writer else { return };
        let there = self.journals[writer].newest(self.id).and_then(Record::written_at).map(number);
        let writes_here = there.unwrap_or(writer) == node;
        for known in &mut self.known {
            let written = known.since_flush.len() + usize::from(known.lost);
            let lost = writes_here && written > 1;
            known.cut |= lost;
            if lost && writer != node {
                self.deceived = Some(writer);
            }
        }
    }

    /// Whoever has no device any more, or one that fails everything, has been stopped.
    fn stopped(&mut self) {
        let Some(node) = self.deceived else { return };
        let fails =
            |handle: plan::Device| handle.table.is_some_and(|table| table.target == Target::Error);
        if self.handle(node).is_none_or(fails) {
            self.deceived = None;
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
            Op::Borrow(from, to, hold) => self.begin_move_to(from, to, hold, true),
            Op::TakeBack(node) => self.take_back(node),
            Op::Localize(node) => self.localize(node),
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
                self.hear();
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
        self.stopped();
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
                    // What is elsewhere comes here, or stops being used.
                    let failed = record.receiving().is_some_and(|r| r.failure.is_some());
                    if round > 30 && record.written_at().is_some() {
                        let _ = match failed || round > 55 {
                            true => self.detach(node),
                            false => self.localize(node),
                        };
                    }
                    // A grant that nobody has received, or will ever take.
                    if round > 50
                        && let Some(lent) = record.lent()
                        && matches!(lent.stage, LentStage::Published | LentStage::Fenced)
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
            self.hear();
            self.stopped();
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
    Borrow(usize, usize, bool),
    TakeBack(usize),
    Localize(usize),
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
        6 => (way.clone(), any::<bool>()).prop_map(|((from, to), hold)| Op::Move(from, to, hold)),
        3 => (way, any::<bool>()).prop_map(|((from, to), hold)| Op::Borrow(from, to, hold)),
        1 => node.clone().prop_map(Op::TakeBack),
        1 => node.clone().prop_map(Op::Localize),
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
    for (power_too, busy) in [(false, false), (false, true), (true, false), (true, true)] {
        for actions in 0.. {
            let mut cluster = Cluster::new();
            cluster.world.busy = busy;
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

/// A volume is used elsewhere without a copy, comes home, goes out again, and is
/// copied there in the end.
fn remote_story(cluster: &mut Cluster) -> Result<(), Stop> {
    cluster.create(0)?;
    cluster.attach(0, false)?;
    for region in 0..SMALL {
        cluster.write(0, region);
    }
    cluster.flush(0);
    for homeward in [true, false] {
        cluster.begin_move_to(0, 1, true, true)?;
        cluster.read(1, 0);
        cluster.write(0, 1);
        cluster.write(1, 0);
        cluster.switch(1, false)?;
        cluster.write(1, 1);
        cluster.read(1, 0);
        cluster.flush(1);
        if homeward {
            cluster.detach(0)?;
            cluster.detach(1)?;
            cluster.attach(0, true)?;
            cluster.read(0, 1);
            cluster.write(0, 0);
        }
    }
    cluster.localize(1)?;
    cluster.write(1, 0);
    cluster.read(1, 1);
    cluster.flush(1);
    for _ in 0..=REGIONS {
        cluster.world.hydrate();
        cluster.converge_all(1)?;
    }
    Ok(())
}

#[test]
fn a_volume_is_used_elsewhere_and_ends_well_wherever_the_process_dies() {
    for power_too in [false, true] {
        for actions in 0.. {
            let mut cluster = Cluster::new();
            cluster.world.fuse = Some(actions);
            let outcome = remote_story(&mut cluster);
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
            cluster.converge_all(0).unwrap();
            assert!(actions > 80, "the story has too few actions to be the story");
            cluster.judge();
            break;
        }
    }
}

#[test]
fn consumers_are_stopped_whose_source_lost_power_under_them() {
    let mut cluster = Cluster::new();
    cluster.create(0).unwrap();
    cluster.attach(0, false).unwrap();
    cluster.begin_move_to(0, 1, true, true).unwrap();
    cluster.switch(1, false).unwrap();
    cluster.write(1, 0);
    cluster.power_cut(0);
    cluster.converge_all(0).unwrap();
    let copy = cluster.journals[1].newest(cluster.id).cloned().unwrap();
    assert_eq!(cluster.world.flush_handle(1, &copy), Io::Waits, "nobody answers unasked");
    cluster.converge_all(1).unwrap();
    let failed = cluster.journals[1].newest(cluster.id).cloned().unwrap();
    assert!(failed.receiving().unwrap().failure.is_some());
    assert_eq!(cluster.world.flush_handle(1, &copy), Io::Failed);
    // Whoever used it is gone with the device, and the volume goes home.
    cluster.detach(1).unwrap();
    assert!(cluster.journals[1].copies.is_empty() && cluster.world.is_clean(1));
    cluster.converge_all(0).unwrap();
    cluster.attach(0, true).unwrap();
    cluster.read(0, 0);
}

#[test]
fn a_volume_that_was_taken_back_needs_no_word_after_a_reboot() {
    let mut cluster = Cluster::new();
    cluster.create(0).unwrap();
    cluster.attach(0, false).unwrap();
    cluster.begin_move_to(0, 1, true, true).unwrap();
    cluster.switch(1, false).unwrap();
    cluster.write(1, 0);
    cluster.world.network = false;
    cluster.take_back(0).unwrap();
    cluster.power_cut(0);
    cluster.converge_all(0).unwrap();
    cluster.attach(0, false).unwrap();
    cluster.read(0, 0);
}

#[test]
fn a_cable_that_was_pulled_stops_nobody() {
    let mut cluster = Cluster::new();
    cluster.create(0).unwrap();
    cluster.attach(0, false).unwrap();
    cluster.begin_move_to(0, 1, true, true).unwrap();
    cluster.switch(1, false).unwrap();
    cluster.world.network = false;
    cluster.write(1, 0);
    assert!(matches!(cluster.converge_all(1), Err(Stop::Stuck(_))));
    cluster.world.network = true;
    cluster.world.pass();
    cluster.hear();
    assert_eq!(cluster.known[0].since_flush.len(), 2, "what waited was done");
    cluster.converge_all(1).unwrap();
    cluster.read(1, 0);
    cluster.flush(1);
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

/// A read waits for a source that has lost power, and keeps the handle from being opened;
/// the source waits to be asked.
#[test]
fn a_handle_that_cannot_be_opened_keeps_nobody_from_asking() {
    let mut cluster = Cluster::new();
    cluster.create(0).unwrap();
    cluster.attach(0, false).unwrap();
    cluster.begin_move_to(0, 1, true, true).unwrap();
    cluster.power_cut(1);
    cluster.power_cut(0);
    // Its handle is there again, and no way to the source.
    let _ = cluster.converge_all(1);
    let copy = cluster.journals[1].newest(cluster.id).cloned().unwrap();
    assert_eq!(cluster.world.read_handle(1, &copy, 0), Io::Waits);
    cluster.write(1, 1);
    let _ = cluster.converge_all(1);
    cluster.power_cut(0);
    cluster.heal();
    cluster.judge();
}

/// The same while a copy is about to begin.
#[test]
fn a_handle_that_cannot_be_held_keeps_nobody_from_asking() {
    let mut met = 0;
    for actions in 0..40 {
        let mut cluster = Cluster::new();
        cluster.create(0).unwrap();
        cluster.attach(0, false).unwrap();
        cluster.begin_move_to(0, 1, true, true).unwrap();
        cluster.switch(1, false).unwrap();
        cluster.world.fuse = Some(actions);
        let _ = cluster.localize(1);
        cluster.world.fuse = None;
        let copy = cluster.journals[1].newest(cluster.id).cloned().unwrap();
        let settling = copy.receiving().is_some_and(|r| r.stage == ReceivingStage::Settling);
        met += u32::from(settling && !cluster.world.holds(1, &copy));
        cluster.world.network = false;
        cluster.write(1, 0);
        cluster.power_cut(0);
        cluster.heal();
        cluster.judge();
    }
    assert!(met > 0, "it never came to that");
}

/// The source has died while it closed, or lost power; whoever asks again has lost power
/// as well, and asks before the source is tended.
#[test]
fn a_fence_that_was_begun_ends_for_a_later_session() {
    let mut met = 0;
    for (actions, power_too) in (0..60).flat_map(|at| [(at, false), (at, true)]) {
        let mut cluster = Cluster::new();
        cluster.create(0).unwrap();
        cluster.attach(0, false).unwrap();
        cluster.begin_move_to(0, 1, true, true).unwrap();
        cluster.switch(1, false).unwrap();
        cluster.write(1, 0);
        cluster.world.fuse = Some(actions);
        let _ = cluster.localize(1);
        cluster.world.fuse = None;
        let source = cluster.journals[0].newest(cluster.id);
        let fencing = source.and_then(Record::lent).map(|lent| lent.stage);
        met += u32::from(fencing == Some(LentStage::Fencing));
        cluster.power_cut(1);
        if power_too {
            cluster.power_cut(0);
        }
        let _ = cluster.converge_all(1);
        cluster.heal();
        cluster.judge();
    }
    assert!(met > 0, "it never came to that");
}

/// The same, but only the source has lost power, and its borrower gives up.
#[test]
fn a_fence_that_lost_its_power_is_no_reason_to_keep_a_volume_away() {
    let mut met = 0;
    for actions in 0..60 {
        let mut cluster = Cluster::new();
        cluster.create(0).unwrap();
        cluster.attach(0, false).unwrap();
        cluster.begin_move_to(0, 1, true, true).unwrap();
        cluster.switch(1, false).unwrap();
        cluster.write(1, 0);
        cluster.world.fuse = Some(actions);
        let _ = cluster.localize(1);
        cluster.world.fuse = None;
        cluster.power_cut(0);
        let source = cluster.journals[0].newest(cluster.id);
        let fencing = source.and_then(Record::lent).map(|lent| lent.stage);
        met += u32::from(fencing == Some(LentStage::Fencing));
        let _ = cluster.detach(1);
        cluster.heal();
        cluster.judge();
    }
    assert!(met > 0, "it never came to that");
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
