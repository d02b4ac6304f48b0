//! Random walks of two nodes through every call, crash, power cut and cut cable,
//! with an oracle that knows what was acknowledged.
//!
//! What the oracle insists on, at every step: a read that succeeds anywhere
//! returns the last acknowledged value (after a power cut of the writer: one
//! acknowledged since the last flush); once a node has acknowledged a write
//! under one generation, nobody acknowledges one under an earlier generation.
//! At the end, when everything is healed: one node has the volume, all of it,
//! and the other has nothing.

use std::collections::BTreeMap;

use proptest::prelude::*;
use uuid::Uuid;

use crate::{
    admit::{self, Admitted, Claim, GrantRequest, Offer, PoolRoom, Refusal},
    name::VolumeId,
    plan::{self, Call, Next, Wait},
    sim::{FOREIGN, Fault, Io, REGIONS, VOLUME_BYTES, World},
    volume::{Borrower, Event, ExportName, Fate, LentStage, Phase, Record, Source, Tombstone},
};

#[derive(Debug, Clone, PartialEq, Eq)]
enum Stop {
    /// The agent of this node died.
    Crash(usize),
    /// Nothing more can be done now.
    Stuck(String),
    Refused(Refusal),
}

#[derive(Debug, Default)]
struct Journal {
    record: Option<Record>,
    stones: BTreeMap<Uuid, Tombstone>,
}

/// What may be read of a region: the last value, and those that a power cut
/// could bring back.
#[derive(Debug, Clone)]
struct Known {
    since_flush: Vec<u64>,
    cut: bool,
}

#[derive(Debug)]
struct Cluster {
    world: World,
    journals: Vec<Journal>,
    id: VolumeId,
    known: Vec<Known>,
    newest: u64,
    /// Where the last write was acknowledged.
    writer: Option<usize>,
    value: u64,
    lose_answers: bool,
}

fn name(node: usize) -> String {
    format!("n{node}")
}

impl Cluster {
    fn new() -> Self {
        let mut world = World::new(2);
        let id = VolumeId::new(world.unique());
        let blank = Known { since_flush: vec![0], cut: false };
        Self {
            world,
            journals: vec![Journal::default(), Journal::default()],
            id,
            known: vec![blank; REGIONS],
            newest: 0,
            writer: None,
            value: 0,
            lose_answers: false,
        }
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
        self.journals[node].record = Some(record);
        Ok(())
    }

    fn journal(&mut self, node: usize, event: Event) -> Result<(), Stop> {
        let record = self.journals[node].record.clone().unwrap();
        if event == Event::Revoked {
            let lent = record.lent().unwrap();
            let stone = Tombstone {
                volume: record.id,
                incarnation: record.incarnation,
                grant: lent.to.grant,
                fate: Fate::Revoked,
            };
            self.journals[node].stones.insert(stone.grant, stone);
        }
        let after = record.after(event).expect("the planner names possible events only");
        self.put(node, after)
    }

    fn forget(&mut self, node: usize) -> Result<(), Stop> {
        self.write_down(node)?;
        let record = self.journals[node].record.take().unwrap();
        for stone in record.epitaphs() {
            self.journals[node].stones.insert(stone.grant, stone);
        }
        Ok(())
    }

    fn apply(&mut self, node: usize, step: &plan::Step) -> Result<Option<Event>, Stop> {
        let record = self.journals[node].record.clone().unwrap();
        let outcome = self.world.apply(node, &record, step);
        self.hear(node);
        outcome.map_err(|fault| match fault {
            Fault::Crash => Stop::Crash(node),
            Fault::Busy => Stop::Stuck(format!("{step:?}: busy")),
            Fault::Refused(why) | Fault::Mismatch(why) => Stop::Stuck(format!("{step:?}: {why}")),
        })
    }

    /// What a swap let through was acknowledged.
    fn hear(&mut self, _node: usize) {
        for (node, region, value) in std::mem::take(&mut self.world.released) {
            self.acknowledged(node, region, value);
        }
    }

    fn acknowledged(&mut self, node: usize, region: usize, value: u64) {
        let generation = self.journals[node].record.as_ref().unwrap().generation.0;
        assert!(generation >= self.newest, "a write under an old generation was acknowledged");
        self.newest = generation;
        self.writer = Some(node);
        let known = &mut self.known[region];
        known.cut = false;
        known.since_flush.push(value);
    }

    fn converge(&mut self, node: usize) -> Result<(), Stop> {
        let mut connecting = false;
        for _ in 0..100 {
            let Some(record) = self.journals[node].record.clone() else { return Ok(()) };
            let seen = plan::Seen { connecting, ..self.world.look(node, &record) };
            match plan::next(&record, &seen) {
                Next::Do(steps) if plan::is_attempt(&record, &steps) => {
                    connecting = true;
                    match self.apply(node, &steps[0]) {
                        Err(Stop::Crash(node)) => return Err(Stop::Crash(node)),
                        Ok(_) | Err(_) => {}
                    }
                }
                Next::Do(steps) => {
                    for step in steps {
                        self.apply(node, &step)?;
                    }
                }
                Next::DoThen(step, event) => {
                    self.apply(node, &step)?;
                    self.journal(node, event)?;
                }
                Next::Allocate(steps) => {
                    for step in steps {
                        if let Some(event) = self.apply(node, &step)? {
                            self.journal(node, event)?;
                        }
                    }
                }
                Next::JournalFloor => {
                    let Some(crate::table::CloneStatus::Working { hydrated, .. }) =
                        seen.clone_status
                    else {
                        panic!("a floor without a clone");
                    };
                    self.world.flush_handle(node, &record);
                    // Without a handle nothing has committed.
                    let floor = if self.world.has_handle(node, &record) { hydrated } else { 0 };
                    if floor == 0 {
                        return Ok(());
                    }
                    self.journal(node, Event::Floor(floor))?;
                }
                Next::Journal(event) => self.journal(node, event)?,
                Next::Ask(call) => {
                    let event = self.ask(node, &record, call)?;
                    self.journal(node, event)?;
                }
                Next::AskThenForget(_) => {
                    let source = record.receiving().unwrap().source.clone();
                    let grant = source.grant;
                    let answer = self
                        .call(node, &source.node, |cluster, there| cluster.revoke(there, grant))?;
                    assert!(!matches!(answer, Err(Refusal::GrantFenced(_))), "fenced unasked");
                    self.forget(node)?;
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
                        self.apply(node, &step)?;
                    }
                    self.forget(node)?;
                }
            }
        }
        panic!("acting changes nothing: {:?}", self.journals[node].record);
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
        let there = usize::from(there == "n1");
        let answer = call(self, there);
        if self.lose_answers {
            return Err(unreachable());
        }
        match answer {
            Ok(value) => Ok(Ok(value)),
            Err(Stop::Refused(refusal)) => Ok(Err(refusal)),
            Err(stop) => Err(stop),
        }
    }

    fn ask(&mut self, node: usize, record: &Record, call: Call) -> Result<Event, Stop> {
        let id = self.id;
        if let Call::QueryGrant = call {
            let borrower = record.lent_before.clone().unwrap();
            let taken = self.call(node, &borrower.node, |cluster, there| {
                let journal = &cluster.journals[there];
                let here = journal.record.as_ref().is_some_and(|r| r.has_taken(borrower.grant));
                let stone = journal.stones.get(&borrower.grant);
                Ok(here || stone.is_some_and(|stone| stone.fate == Fate::Taken))
            })?;
            return match taken {
                Ok(false) => Ok(Event::Confirmed(self.world.nodes[node].boot)),
                Ok(true) | Err(_) => Err(Stop::Stuck("it was taken".into())),
            };
        }
        let source = record.receiving().unwrap().source.clone();
        let claim = Claim {
            grant: source.grant,
            incarnation: record.incarnation,
            generation: source.generation,
        };
        match call {
            Call::Fence => {
                let answer = self.call(node, &source.node, |cluster, there| {
                    cluster.request(there, |record| admit::fence(known(record, id)?, &claim))
                })?;
                match answer {
                    Ok(()) => Ok(Event::SourceFenced),
                    Err(refusal) => {
                        self.journal(node, Event::SourceRefused)?;
                        Err(Stop::Stuck(refusal.to_string()))
                    }
                }
            }
            Call::Release => {
                let answer = self.call(node, &source.node, |cluster, there| {
                    if cluster.journals[there].stones.contains_key(&claim.grant) {
                        return Ok(());
                    }
                    cluster.request(there, |record| admit::release(known(record, id)?, &claim))
                })?;
                match answer {
                    Ok(()) | Err(Refusal::GrantUnknown(_) | Refusal::VolumeNotFound(_)) => {
                        Ok(Event::SourceReleased)
                    }
                    Err(refusal) => panic!("the source refuses to let go: {refusal}"),
                }
            }
            Call::Revoke | Call::QueryGrant => unreachable!("not asked this way"),
        }
    }

    fn revoke(&mut self, node: usize, grant: Uuid) -> Result<(), Stop> {
        let id = self.id;
        if self.journals[node].stones.contains_key(&grant) {
            return Ok(());
        }
        self.request(node, |record| admit::revoke(known(record, id)?, grant))
    }

    fn request(
        &mut self,
        node: usize,
        admit: impl FnOnce(Option<&Record>) -> Result<Admitted, Refusal>,
    ) -> Result<(), Stop> {
        self.admit(node, admit)?;
        self.converge(node)
    }

    /// Whether the request has begun something.
    fn admit(
        &mut self,
        node: usize,
        admit: impl FnOnce(Option<&Record>) -> Result<Admitted, Refusal>,
    ) -> Result<bool, Stop> {
        let record = self.journals[node].record.clone();
        match admit(record.as_ref()).map_err(Stop::Refused)? {
            Admitted::Already => Ok(false),
            Admitted::Journal(record) => self.put(node, *record).map(|()| true),
        }
    }

    /// A request that is undone when it fails half-way, as the daemon does.
    fn undoable(
        &mut self,
        node: usize,
        admit: impl FnOnce(Option<&Record>) -> Result<Admitted, Refusal>,
        event: Event,
    ) -> Result<(), Stop> {
        // A repeated request has begun nothing and undoes nothing.
        let begun = self.admit(node, admit)?;
        let outcome = self.converge(node);
        if let Err(Stop::Stuck(_)) = outcome
            && begun
            && let Some(record) = self.journals[node].record.clone()
            && record.after(event.clone()).is_ok()
        {
            self.journal(node, event)?;
            let _ = self.converge(node);
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
        let record = self.journals.iter().find_map(|journal| journal.record.as_ref())?;
        self.world.look(node, record).handle
    }

    fn create(&mut self, node: usize) -> Result<(), Stop> {
        let (id, incarnation) = (self.id, self.world.unique());
        self.undoable(
            node,
            |record| admit::create(record, id, VOLUME_BYTES, &Self::room(), incarnation),
            Event::DeleteAsked,
        )
    }

    fn attach(&mut self, node: usize, named: bool) -> Result<(), Stop> {
        let (id, handle, boot) = (self.id, self.handle(node), self.world.nodes[node].boot);
        self.request(node, |record| {
            let record = known(record, id)?;
            let generation = named.then_some(record.generation);
            admit::attach(record, generation, handle.as_ref(), boot)
        })
    }

    fn detach(&mut self, node: usize) -> Result<(), Stop> {
        let (id, handle) = (self.id, self.handle(node));
        self.request(node, |record| admit::detach(known(record, id)?, handle.as_ref()))
    }

    fn begin_move(&mut self, from: usize, hold: bool) -> Result<(), Stop> {
        let (id, to, boot) = (self.id, 1 - from, self.world.nodes[from].boot);
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
        };
        self.undoable(
            from,
            |record| admit::grant(known(record, id)?, request, &name(from), boot, None),
            Event::RevokeAsked,
        )?;
        let record = self.journals[from].record.clone().unwrap();
        let lent = record.lent().unwrap();
        let offer = Offer {
            id,
            incarnation: record.incarnation,
            size: record.size.bytes(),
            logical_block_size: record.logical_block_size,
            source: Source {
                grant,
                node: name(from),
                endpoint: "https://peer".into(),
                generation: record.generation,
                hold,
                export: lent.export.clone(),
            },
        };
        let handle = self.handle(to);
        let outcome = self.undoable(
            to,
            |record| admit::receive(record, offer, &Self::room(), handle.as_ref(), &name(to), None),
            Event::AbortAsked,
        );
        if let Err(Stop::Refused(_) | Stop::Stuck(_)) = outcome
            && self.journals[to].record.is_none()
        {
            // The caller's part: a definite refusal ends the grant.
            let _ = self.revoke(from, grant);
        }
        outcome
    }

    fn switch(&mut self, node: usize) -> Result<(), Stop> {
        let id = self.id;
        self.request(node, |record| admit::switch(known(record, id)?))
    }

    fn abort(&mut self, node: usize) -> Result<(), Stop> {
        let id = self.id;
        let held = self.journals[node].record.as_ref().map(|r| self.world.look(node, r).held);
        self.request(node, |record| admit::abort(known(record, id)?, held.unwrap_or(0)))
    }

    fn write(&mut self, node: usize, region: usize) {
        let Some(record) = self.journals[node].record.clone() else { return };
        self.value += 1;
        let value = self.value;
        if self.world.write_handle(node, &record, region, value) == Io::Done(()) {
            self.acknowledged(node, region, value);
        }
    }

    fn flush(&mut self, node: usize) {
        let Some(record) = self.journals[node].record.clone() else { return };
        if self.world.flush_handle(node, &record) == Io::Done(()) {
            for known in &mut self.known {
                if !known.cut {
                    known.since_flush = known.since_flush.split_off(known.since_flush.len() - 1);
                }
            }
        }
    }

    fn read(&mut self, node: usize, region: usize) {
        let Some(record) = self.journals[node].record.clone() else { return };
        if let Io::Done(value) = self.world.read_handle(node, &record, region) {
            self.check(region, value);
        }
    }

    fn check(&mut self, region: usize, value: u64) {
        assert_ne!(value, FOREIGN, "another volume's past shows in region {region}");
        let known = &mut self.known[region];
        if known.cut {
            assert!(known.since_flush.contains(&value), "region {region}: {value} of {known:?}");
            // What survived the cut is what is there from now on.
            known.since_flush = vec![value];
            known.cut = false;
        } else {
            assert_eq!(known.since_flush.last(), Some(&value), "region {region} is stale");
        }
    }

    fn power_cut(&mut self, node: usize) {
        self.world.power_cut(node);
        // What was acknowledged elsewhere is not in this node's caches.
        let writes_here = self.writer == Some(node);
        for known in &mut self.known {
            known.cut |= writes_here && known.since_flush.len() > 1;
        }
    }

    fn run(&mut self, op: &Op) {
        let outcome = match *op {
            Op::Create(node) => match &self.journals[1 - node].record {
                // Placement is the caller's: a volume has one home.
                None => self.create(node),
                Some(_) => Ok(()),
            },
            Op::Attach(node, named) => self.attach(node, named),
            Op::Detach(node) => self.detach(node),
            Op::Move(from, hold) => self.begin_move(from, hold),
            Op::Switch(node) => self.switch(node),
            Op::Abort(node) => self.abort(node),
            Op::Tend(node) => self.converge(node),
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
            Op::Network(up) => {
                self.world.network = up;
                Ok(())
            }
            Op::LoseAnswers(lose) => {
                self.lose_answers = lose;
                Ok(())
            }
            Op::Users(node, users) => {
                if let Some(record) = self.journals[node].record.clone() {
                    self.world.set_users(node, &record, users);
                }
                Ok(())
            }
        };
        if let Err(Stop::Crash(_)) = outcome {
            self.world.fuse = None;
        }
    }

    /// Everything works again; everybody has time.
    fn heal(&mut self) {
        self.world.fuse = None;
        self.world.fault = None;
        self.world.network = true;
        self.lose_answers = false;
        for round in 0..60 {
            for node in 0..2 {
                if let Some(record) = self.journals[node].record.clone() {
                    self.world.set_users(node, &record, 0);
                    if round > 20 && record.receiving().is_some_and(|r| !r.stage.is_taken()) {
                        let _ = self.switch(node);
                        let _ = self.abort(node);
                    }
                    if round > 40
                        && record.lent().is_some_and(|l| l.stage == LentStage::Published)
                        && self.journals[1 - node].record.is_none()
                    {
                        let _ = self.abort(node);
                    }
                }
                let _ = self.converge(node);
            }
            self.world.hydrate();
        }
    }

    fn judge(&mut self) {
        let homes: Vec<usize> =
            (0..2).filter(|node| self.journals[*node].record.is_some()).collect();
        match homes.as_slice() {
            [] => assert_eq!(self.newest, 0, "the only copy is gone"),
            [home] => {
                let record = self.journals[*home].record.clone().unwrap();
                assert_eq!(record.phase, Phase::Local, "no way to rest");
                self.attach(*home, true).unwrap();
                for region in 0..REGIONS {
                    let record = self.journals[*home].record.clone().unwrap();
                    match self.world.read_handle(*home, &record, region) {
                        Io::Done(value) => self.check(region, value),
                        io => panic!("region {region}: {io:?}"),
                    }
                }
                // A handle that an old user held is gone with the user.
                let other = 1 - home;
                self.world.set_users(other, &record, 0);
                assert!(self.world.is_clean(other), "something is left at {other}");
            }
            _ => panic!("two nodes have it: {:#?}", self.journals),
        }
    }
}

fn known(record: Option<&Record>, id: VolumeId) -> Result<&Record, Refusal> {
    record.ok_or(Refusal::VolumeNotFound(id))
}

#[derive(Debug, Clone)]
enum Op {
    Create(usize),
    Attach(usize, bool),
    Detach(usize),
    Move(usize, bool),
    Switch(usize),
    Abort(usize),
    Tend(usize),
    Write(usize, usize),
    Read(usize, usize),
    Flush(usize),
    Hydrate,
    Fuse(usize),
    Fault(usize),
    PowerCut(usize),
    Network(bool),
    LoseAnswers(bool),
    Users(usize, u32),
}

fn any_op() -> impl Strategy<Value = Op> {
    let node = 0usize..2;
    let region = 0usize..REGIONS;
    prop_oneof![
        2 => node.clone().prop_map(Op::Create),
        4 => (node.clone(), any::<bool>()).prop_map(|(node, named)| Op::Attach(node, named)),
        2 => node.clone().prop_map(Op::Detach),
        5 => (node.clone(), any::<bool>()).prop_map(|(node, hold)| Op::Move(node, hold)),
        4 => node.clone().prop_map(Op::Switch),
        2 => node.clone().prop_map(Op::Abort),
        4 => node.clone().prop_map(Op::Tend),
        8 => (node.clone(), region.clone()).prop_map(|(node, region)| Op::Write(node, region)),
        8 => (node.clone(), region).prop_map(|(node, region)| Op::Read(node, region)),
        3 => node.clone().prop_map(Op::Flush),
        6 => Just(Op::Hydrate),
        4 => (0usize..40).prop_map(Op::Fuse),
        3 => (0usize..40).prop_map(Op::Fault),
        2 => node.clone().prop_map(Op::PowerCut),
        3 => any::<bool>().prop_map(Op::Network),
        1 => any::<bool>().prop_map(Op::LoseAnswers),
        1 => (node, 0u32..2).prop_map(|(node, users)| Op::Users(node, users)),
    ]
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 4000, ..ProptestConfig::default() })]

    #[test]
    fn whatever_happens_the_last_acknowledged_write_is_read(
        ops in proptest::collection::vec(any_op(), 1..60)
    ) {
        let mut cluster = Cluster::new();
        let _ = cluster.create(0);
        let _ = cluster.attach(0, false);
        for op in &ops {
            cluster.run(op);
        }
        cluster.heal();
        cluster.judge();
    }
}

/// Runs the demo's story; every action may be the last before a crash.
fn story(cluster: &mut Cluster) -> Result<(), Stop> {
    cluster.create(0)?;
    cluster.attach(0, false)?;
    for region in 0..REGIONS {
        cluster.write(0, region);
    }
    cluster.flush(0);
    cluster.begin_move(0, true)?;
    cluster.read(1, 0);
    cluster.write(0, 1);
    cluster.switch(1)?;
    cluster.write(1, 2);
    cluster.flush(1);
    for _ in 0..=REGIONS {
        cluster.world.hydrate();
        cluster.converge(1)?;
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
    cluster.begin_move(0, true).unwrap();
    cluster.switch(1).unwrap();
    cluster.power_cut(0);
    cluster.converge(0).unwrap();
    let record = cluster.journals[0].record.clone().unwrap();
    assert!(!cluster.world.has_handle(0, &record));
    assert!(matches!(cluster.attach(0, true), Err(Stop::Refused(Refusal::VolumeFenced { .. }))));
}

#[test]
fn a_volume_that_was_once_lent_waits_for_a_word_after_a_reboot() {
    let mut cluster = Cluster::new();
    cluster.create(0).unwrap();
    cluster.attach(0, false).unwrap();
    cluster.begin_move(0, true).unwrap();
    cluster.abort(1).unwrap();
    cluster.world.network = false;
    cluster.power_cut(0);
    assert!(matches!(cluster.converge(0), Err(Stop::Stuck(_))));
    let record = cluster.journals[0].record.clone().unwrap();
    assert!(!cluster.world.has_handle(0, &record), "nobody has confirmed anything");
    assert!(matches!(
        cluster.attach(0, false),
        Err(Stop::Refused(Refusal::ConfirmationRequired { .. }))
    ));
    cluster.world.network = true;
    cluster.converge(0).unwrap();
    assert!(cluster.world.has_handle(0, &record), "the borrower has answered");
}

#[test]
fn a_read_that_waits_for_a_lost_source_does_not_keep_an_abort_from_ending() {
    let mut cluster = Cluster::new();
    cluster.create(0).unwrap();
    cluster.attach(0, false).unwrap();
    cluster.begin_move(0, true).unwrap();
    cluster.world.network = false;
    cluster.power_cut(1);
    // Without a controller the way to the source queues all the same.
    let _ = cluster.converge(1);
    cluster.world.activate(1);
    let _ = cluster.converge(1);
    let record = cluster.journals[1].record.clone().unwrap();
    assert_eq!(cluster.world.read_handle(1, &record, 0), Io::Waits);
    // Only the source's agent cannot be told yet.
    assert!(matches!(cluster.abort(1), Err(Stop::Stuck(why)) if why.contains("does not answer")));
    cluster.world.network = true;
    cluster.converge(1).unwrap();
    assert!(cluster.journals[1].record.is_none() && cluster.world.is_clean(1));
}
