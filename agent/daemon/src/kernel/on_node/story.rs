//! The story of [`agree`], told to this node's kernel.

use dmlocal_model::{admit::PoolRoom, plan, sim::REGION, volume::Record};

use super::*;
use crate::{
    config::Config,
    kernel::{Kernel, agree, real::RealKernel},
};

/// This node, both sides of the move.
struct Node(RealKernel);

fn handle(record: &Record) -> String {
    plan::dm_name(record, Role::Handle).path()
}

fn open_handle(record: &Record, write: bool) -> File {
    let mut options = OpenOptions::new();
    options.read(true).write(write).custom_flags(libc::O_DIRECT);
    options.open(handle(record)).unwrap()
}

fn place(region: usize) -> u64 {
    u64::try_from(region).unwrap() * REGION.bytes()
}

impl agree::Stage for Node {
    fn kernel(&self) -> &dyn Kernel {
        &self.0
    }

    fn pool(&self) -> PoolRoom {
        let facts = self.0.pool("pool").unwrap().unwrap();
        PoolRoom {
            name: "pool".to_owned(),
            logical_block_size: facts.logical_block_size,
            chunk: facts.chunk,
            free: facts.size,
            free_outside: facts.free_outside,
        }
    }

    fn write(&self, record: &Record, region: usize, value: u8) -> Receiver<bool> {
        let file = open_handle(record, true);
        behind(move || {
            let mut buffer = Buffer::new(REGION.bytes());
            buffer.bytes().fill(value);
            file.write_all_at(buffer.bytes(), place(region)).is_ok()
        })
    }

    fn read(&self, record: &Record, region: usize) -> u8 {
        let mut buffer = Buffer::new(REGION.bytes());
        open_handle(record, false).read_exact_at(buffer.bytes(), place(region)).unwrap();
        let first = buffer.bytes()[0];
        assert!(buffer.bytes().iter().all(|byte| *byte == first), "a region torn in two");
        first
    }

    fn while_open(&self, record: &Record, act: &mut dyn FnMut()) {
        let _held = open_handle(record, false);
        act();
    }

    fn pass(&self) {
        thread::sleep(Duration::from_millis(20));
    }
}

#[test]
#[ignore = "needs root and a node's kernel"]
fn this_kernel_is_led_through_the_story_of_the_simulated_one() {
    let bed = Bed::new();
    let state = tempfile::tempdir().unwrap();
    let config = format!(
        "node = \"a\"\nstate = {:?}\n[[pool]]\nname = \"pool\"\nvolume_group = {:?}\nthin_pool = {:?}\n\
         devices = {:?}\n",
        state.path(),
        bed.vg.name,
        bed.vg.thin_pool,
        bed.vg.devices
    );
    let config = Config::parse(&config).unwrap();
    agree::tell(&Node(RealKernel::new(&config, agree::HOST).unwrap()));
}
