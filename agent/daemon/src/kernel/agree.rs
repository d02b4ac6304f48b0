//! One story for the simulated kernel and for a node's: what the planner answers
//! to each, step by step, must be the same, and so must what consumers see.
//!
//! Both sides of the move are on one node, over loopback, so that the same bed
//! does for both kernels; the handle's name is one per volume, so the source is
//! detached before the destination exists. Every step is done twice, because a
//! crash before the journal makes the daemon do so.

use std::{
    sync::{Arc, Mutex, mpsc::Receiver},
    thread,
    time::{Duration, Instant},
};

use dmlocal_model::{
    admit::{self, Admitted, Change, Claim, Evidence, GrantRequest, Offer, PoolRoom},
    name::{NQN_PREFIX, Role, VolumeId},
    plan::{self, Call, Next, Seen, Step, Wait},
    seeding::{AllocationMap, SourceMap},
    sim::{Io, REGION, REGIONS, VOLUME_BYTES, World},
    table::{CloneStatus, Table},
    units::DevNo,
    volume::{Borrower, Event, ExportName, Phase, Record, Source},
};
use tokio::sync::Notify;
use uuid::Uuid;

use super::{
    Kernel, StepError,
    fake::{FakeKernel, every_target, locked, roomy_pool},
};

/// Longest wait for something that must happen.
const LONG: Duration = Duration::from_secs(60);

/// What both kernels are led through. Copying is left out, because it has no
/// fixed length.
const STORY: &[&str] = &[
    "create",
    "Allocate",
    "attach",
    "Set Handle linear(data)",
    "wanted by an opener",
    "Remove busy",
    "detach",
    "Remove Handle",
    "grant",
    "Set Export delay(data)",
    "Publish",
    "Announce",
    "Wait Peer",
    "fence",
    "Flush data",
    "Fenced",
    "Wait Peer",
    "receive",
    "Allocate+Connect",
    "ZeroMeta meta",
    "Zeroed",
    "Set Src multipath(import)",
    "LoadClone new clone(meta data src)",
    "BlockDiscards clone",
    "Armed",
    "Set Handle delay(clone src clone clone)",
    "Wait Switch",
    "write",
    "SwitchAsked",
    "Ask Fence",
    "SourceFenced",
    "OpenHandle linear(clone)",
    "DropCache",
    "AskForMap",
    "Seed",
    "Seeded",
    "Tune",
    "pause",
    "Wait Hydration",
    "resume",
    "Hydrate true",
    "Commit",
    "Committed",
    "Set Handle linear(data)",
    "Flush data",
    "Collapsed",
    "Remove Clone",
    "Remove Src",
    "Disconnect",
    "RetireMeta",
    "MetaRetired",
    "Ask Release",
    "SourceReleased",
    "detach",
    "Remove Handle",
    "release",
    "Unpublish",
    "Remove Export",
    "Forget RetireAll",
    "delete",
    "Forget RetireAll",
];

/// What a story needs of the world beside the kernel.
pub(super) trait Stage {
    fn kernel(&self) -> &dyn Kernel;

    /// The pool to use.
    fn pool(&self) -> PoolRoom;

    /// Writes a whole region of the handle; the answer comes when it is
    /// acknowledged, and tells whether it was.
    fn write(&self, record: &Record, region: usize, value: u8) -> Receiver<bool>;

    /// What a region of the handle holds.
    fn read(&self, record: &Record, region: usize) -> u8;

    /// Holds the handle open while `act` runs.
    fn while_open(&self, record: &Record, act: &mut dyn FnMut());

    /// Lets time pass for a copy.
    fn pass(&self);
}

struct Story<'a> {
    stage: &'a dyn Stage,
    told: Vec<String>,
    tuned: Option<(u32, u32)>,
    cache_dropped: bool,
    announced: bool,
    map: SourceMap,
    /// The fenced source, once there is one.
    source: Option<Record>,
}

/// What the source holds before the move. Two regions were never written, and one of
/// them is written at the destination before that is known there.
fn before(region: usize) -> u8 {
    if matches!(region, 1 | 2) { 0 } else { 100 + u8::try_from(region).unwrap() }
}

fn granted(outcome: Result<Admitted, admit::Refusal>, before: &Record) -> Record {
    match outcome.unwrap() {
        Admitted::Journal(record) => *record,
        Admitted::Already => before.clone(),
    }
}

/// The name that a device number has in the story.
fn label(number: DevNo, seen: &Seen) -> &'static str {
    let lv = |lv: &Option<plan::Lv>| lv.is_some_and(|lv| lv.device == number);
    let mapped = |device: &Option<plan::Device>| {
        device.as_ref().is_some_and(|device| device.number == number)
    };
    match () {
        () if lv(&seen.data) => "data",
        () if lv(&seen.meta) => "meta",
        () if mapped(&seen.clone) => "clone",
        () if mapped(&seen.src) => "src",
        () if seen.import.namespace == Some(number) => "import",
        () => "unknown",
    }
}

fn table(table: &Table, seen: &Seen) -> String {
    let below: Vec<_> = table.devices().iter().map(|n| label(*n, seen)).collect();
    format!("{}({})", table.target.kind(), below.join(" "))
}

fn word(step: &Step, seen: &Seen) -> String {
    match step {
        Step::Set(role, to) => format!("Set {role:?} {}", table(to, seen)),
        Step::LoadClone { table: to, floor } => {
            let kind = if floor.is_some() { "armed" } else { "new" };
            format!("LoadClone {kind} {}", table(to, seen))
        }
        Step::OpenHandle(to) => format!("OpenHandle {}", table(to, seen)),
        Step::Remove(role) => format!("Remove {role:?}"),
        Step::Hydrate(on) => format!("Hydrate {on}"),
        Step::ZeroMeta(number) => format!("ZeroMeta {}", label(*number, seen)),
        Step::Flush(number) => format!("Flush {}", label(*number, seen)),
        Step::BlockDiscards(number) => format!("BlockDiscards {}", label(*number, seen)),
        step => {
            let text = format!("{step:?}");
            text.split(|c: char| !c.is_alphanumeric()).next().unwrap_or_default().to_owned()
        }
    }
}

impl Story<'_> {
    fn tell(&mut self, what: impl Into<String>) {
        self.told.push(what.into());
    }

    /// Does a step twice, as after a crash before the journal.
    fn twice(&mut self, record: &Record, step: &Step, seen: &Seen) -> Option<Event> {
        let first = self.stage.kernel().apply(record, step);
        let first = first.unwrap_or_else(|error| panic!("{}: {error}", word(step, seen)));
        let again = self.stage.kernel().apply(record, step);
        let again = again.unwrap_or_else(|error| panic!("{} again: {error}", word(step, seen)));
        assert_eq!(first, again, "{}", word(step, seen));
        first
    }

    fn happened(&mut self, record: &Record, event: Event) -> Record {
        let text = format!("{event:?}");
        let name = text.split(|c: char| !c.is_alphanumeric()).next().unwrap_or_default();
        if !matches!(event, Event::Allocated { .. } | Event::Floor(_)) {
            self.tell(name);
        }
        record.clone().after(event).unwrap()
    }

    /// Does what the planner wants until it wants no more; none when the record
    /// is gone.
    fn drive(&mut self, mut record: Record) -> Option<Record> {
        let deadline = Instant::now() + LONG;
        loop {
            assert!(Instant::now() < deadline, "no end after {:#?}", self.told);
            let seen = Seen {
                tuned: self.tuned,
                cache_dropped: self.cache_dropped,
                announced: self.announced,
                map: self.map.clone(),
                ..self.stage.kernel().look(&record).unwrap()
            };
            match plan::next(&record, &seen) {
                Next::Do(steps) => {
                    for step in steps {
                        self.tell(word(&step, &seen));
                        self.twice(&record, &step, &seen);
                        match step {
                            Step::Tune { threshold, batch } => {
                                self.tuned = Some((threshold, batch));
                            }
                            Step::DropCache(_) => self.cache_dropped = true,
                            Step::Set(Role::Export, _) => self.announced = false,
                            Step::Announce(_) => self.announced = true,
                            _ => {}
                        }
                    }
                }
                Next::DoThen(step, event) => {
                    self.tell(word(&step, &seen));
                    self.twice(&record, &step, &seen);
                    record = self.happened(&record, event);
                }
                Next::Allocate(steps) => {
                    let words: Vec<_> = steps.iter().map(|step| word(step, &seen)).collect();
                    self.tell(words.join("+"));
                    let events: Vec<_> =
                        steps.iter().filter_map(|s| self.twice(&record, s, &seen)).collect();
                    for event in events {
                        record = self.happened(&record, event);
                    }
                }
                Next::JournalFloor => {
                    let floor = self.stage.kernel().committed(&record).unwrap();
                    record = self.happened(&record, Event::Floor(floor));
                }
                Next::Journal(event) => record = self.happened(&record, event),
                Next::Ask(call) => {
                    self.tell(format!("Ask {call:?}"));
                    let answer = match call {
                        Call::Fence => Event::SourceFenced,
                        Call::Release => Event::SourceReleased,
                        Call::Copy
                        | Call::Serve
                        | Call::Return
                        | Call::Revoke
                        | Call::QueryGrant => {
                            panic!("{call:?}")
                        }
                    };
                    record = self.happened(&record, answer);
                }
                Next::AskForMap => {
                    self.tell("AskForMap");
                    let (source, copy) =
                        (self.source.clone().unwrap(), record.receiving().unwrap());
                    let told = self.stage.kernel().allocation(&source, copy.region);
                    self.map = SourceMap::Known(Arc::new(AllocationMap {
                        grant: copy.source.grant,
                        incarnation: source.incarnation,
                        generation: source.generation,
                        length: source.size,
                        region: copy.region,
                        unwritten: told.unwrap(),
                    }));
                }
                Next::Wait(Wait::Hydration) if !record.tuning.paused => self.stage.pass(),
                Next::Wait(wait) => {
                    self.tell(format!("Wait {wait:?}"));
                    return Some(record);
                }
                Next::Settled => return Some(record),
                Next::Forget(steps) => {
                    for step in steps {
                        self.tell(format!("Forget {}", word(&step, &seen)));
                        self.twice(&record, &step, &seen);
                    }
                    return None;
                }
                Next::AskThenForget(call) => panic!("{call:?}"),
            }
        }
    }

    fn run(&mut self) {
        let stage = self.stage;
        let pool = stage.pool();
        let id = VolumeId::new(Uuid::new_v4());
        let boot = stage.kernel().boot();
        let begun = admit::create(None, id, VOLUME_BYTES, &pool, Uuid::new_v4()).unwrap();
        let Admitted::Journal(source) = begun else { panic!("a new volume") };

        self.tell("create");
        let source = self.drive(*source).unwrap();
        self.tell("attach");
        let source = granted(admit::attach(&source, None, None, boot), &source);
        let source = self.drive(source).unwrap();
        for region in (0..REGIONS).filter(|region| before(*region) != 0) {
            assert!(stage.write(&source, region, before(region)).recv_timeout(LONG).unwrap());
        }
        self.tell("wanted by an opener");
        stage.while_open(&source, &mut || {
            let handle = stage.kernel().handle(id).unwrap();
            assert_eq!(handle.as_ref().map(|handle| handle.open_count), Some(1));
            assert!(admit::detach(&source, handle.as_ref()).is_err());
            let step = Step::Remove(Role::Handle);
            let outcome = stage.kernel().apply(&source, &step);
            assert!(matches!(outcome, Err(StepError::Busy(_))), "{outcome:?}");
        });
        self.tell("Remove busy");
        self.tell("detach");
        let handle = stage.kernel().handle(id).unwrap();
        let source = granted(admit::detach(&source, handle.as_ref()), &source);
        let source = self.drive(source).unwrap();

        self.tell("grant");
        let to = Borrower {
            grant: Uuid::new_v4(),
            node: "b".to_owned(),
            endpoint: "https://b:7450".to_owned(),
        };
        let export = ExportName {
            subsystem_nqn: format!("{NQN_PREFIX}{}", Uuid::new_v4()),
            namespace_uuid: Uuid::new_v4(),
            namespace_nguid: Uuid::new_v4(),
            address: "127.0.0.1".to_owned(),
            port: 4420,
        };
        let host_nqn = format!("{NQN_PREFIX}{HOST}");
        let request = GrantRequest {
            to: to.clone(),
            host_nqn,
            hold: true,
            export: Some(export.clone()),
            max_depth: 1,
        };
        let source = granted(admit::grant(&source, request, "a", boot, None), &source);
        let source = self.drive(source).unwrap();
        self.tell("fence");
        let claim = Claim {
            grant: to.grant,
            incarnation: source.incarnation,
            generation: source.generation,
            session: 0,
        };
        let source = granted(admit::fence(&source, &claim, Evidence::Quiet, boot), &source);
        let source = self.drive(source).unwrap();

        let allocated = stage.kernel().look(&source).unwrap().allocated.unwrap();
        assert_eq!(allocated.0, 2 * REGION.0, "two regions were written");
        self.source = Some(source.clone());

        self.tell("receive");
        let offer = Offer {
            id,
            incarnation: source.incarnation,
            size: source.size.bytes(),
            logical_block_size: source.logical_block_size,
            made_of: None,
            begins: false,
            source: Source {
                grant: to.grant,
                node: "a".to_owned(),
                endpoint: "https://a:7450".to_owned(),
                generation: source.generation,
                hold: true,
                depth: 1,
                export,
            },
        };
        let begun = admit::receive(None, None, offer, &pool, None, "b", None).unwrap();
        let Admitted::Journal(copy) = begun else { panic!("a new copy") };
        assert_eq!(copy.receiving().unwrap().region, REGION, "the story's regions");
        let copy = self.drive(*copy).unwrap();
        for region in 0..REGIONS {
            assert_eq!(stage.read(&copy, region), before(region), "held");
        }
        self.tell("write");
        let written = stage.write(&copy, 2, 42);
        until("the write waits", || stage.kernel().held(&copy).unwrap() > 0);
        assert!(written.try_recv().is_err(), "acknowledged before the source was fenced");

        // Copying is stopped at first, to see that nothing is copied meanwhile.
        let paused = Change { paused: Some(true), ..Change::default() };
        let copy = granted(admit::tune(&copy, paused), &copy);
        let copy = self.drive(copy).unwrap();
        assert!(written.recv_timeout(LONG).unwrap(), "the held write failed");
        assert_eq!(stage.read(&copy, 2), 42);
        assert_eq!(stage.read(&copy, 3), 103);
        let seen = stage.kernel().look(&copy).unwrap();
        let hydrated = match seen.clone_status {
            Some(CloneStatus::Working { hydrated, .. }) => hydrated,
            status => panic!("{status:?}"),
        };
        assert_eq!(hydrated, 2, "only what was written here, or never at all, is here");
        let last = self.told.pop();
        self.tell("pause");
        self.tell(last.unwrap_or_default());

        self.tell("resume");
        let going = Change { paused: Some(false), ..Change::default() };
        let copy = granted(admit::tune(&copy, going), &copy);
        let copy = self.drive(copy).unwrap();
        assert_eq!(copy.phase, Phase::Local);
        for region in 0..REGIONS {
            let wanted = if region == 2 { 42 } else { before(region) };
            assert_eq!(stage.read(&copy, region), wanted, "collapsed");
        }
        let allocated = stage.kernel().look(&copy).unwrap().allocated.unwrap();
        assert_eq!(allocated.0, 3 * REGION.0, "what was never written takes no room");
        self.tell("detach");
        let handle = stage.kernel().handle(id).unwrap();
        let copy = granted(admit::detach(&copy, handle.as_ref()), &copy);
        let copy = self.drive(copy).unwrap();
        self.tell("release");
        let source = granted(admit::release(&source, &claim), &source);
        assert_eq!(self.drive(source), None);
        self.tell("delete");
        let copy = granted(admit::delete(&copy, None), &copy);
        assert_eq!(self.drive(copy), None);
        let ours = stage.kernel().ours().unwrap();
        assert!(!ours.iter().any(|name| name.contains(&id.to_string())), "left: {ours:?}");
    }
}

/// The host's identity towards the export.
pub(super) const HOST: Uuid = Uuid::from_u128(0x6c61_7374_0000_4000_8000_0000_0000_0001);

/// Leads a stage through the story.
pub(super) fn tell(stage: &dyn Stage) {
    let mut story = Story {
        stage,
        told: Vec::new(),
        tuned: None,
        cache_dropped: false,
        announced: false,
        map: SourceMap::Unasked,
        source: None,
    };
    story.run();
    let told: Vec<&str> = story.told.iter().map(String::as_str).collect();
    assert_eq!(told, STORY);
}

fn until(what: &str, mut done: impl FnMut() -> bool) {
    let end = Instant::now() + LONG;
    while !done() {
        assert!(Instant::now() < end, "{what}");
        thread::sleep(Duration::from_millis(5));
    }
}

/// The simulated node.
struct Simulated(FakeKernel);

impl Stage for Simulated {
    fn kernel(&self) -> &dyn Kernel {
        &self.0
    }

    fn pool(&self) -> PoolRoom {
        let pool = roomy_pool();
        PoolRoom {
            name: "pool".to_owned(),
            logical_block_size: pool.logical_block_size,
            chunk: pool.chunk,
            free: pool.size,
            free_outside: pool.free_outside,
        }
    }

    fn write(&self, record: &Record, region: usize, value: u8) -> Receiver<bool> {
        let (sender, receiver) = std::sync::mpsc::channel();
        let outcome = locked(&self.0.world).write_handle(0, record, region, u64::from(value));
        match outcome {
            Io::Done(()) => sender.send(true).unwrap(),
            Io::Failed => sender.send(false).unwrap(),
            Io::Waits => {
                let world = Arc::clone(&self.0.world);
                thread::spawn(move || {
                    let is_through = |(_, at, written): &(usize, usize, u64)| {
                        (*at, *written) == (region, u64::from(value))
                    };
                    until("the write", || locked(&world).released.iter().any(is_through));
                    sender.send(true)
                });
            }
        }
        receiver
    }

    fn read(&self, record: &Record, region: usize) -> u8 {
        match locked(&self.0.world).read_handle(0, record, region) {
            Io::Done(value) => u8::try_from(value).unwrap(),
            io => panic!("{io:?}"),
        }
    }

    fn while_open(&self, record: &Record, act: &mut dyn FnMut()) {
        locked(&self.0.world).set_users(0, record, 1);
        act();
        locked(&self.0.world).set_users(0, record, 0);
    }

    fn pass(&self) {
        locked(&self.0.world).hydrate();
    }
}

#[test]
fn the_simulated_kernel_is_led_through_the_story() {
    tell(&Simulated(FakeKernel {
        world: Arc::new(Mutex::new(World::new(1))),
        node: 0,
        died: Arc::new(Notify::new()),
        pool: Some(roomy_pool()),
        targets: every_target(),
    }));
}
