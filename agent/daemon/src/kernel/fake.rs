//! The simulated kernel behind the daemon's seam.

use std::{
    net::IpAddr,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
};

use dmlocal_model::{
    name::VolumeId,
    plan::{Device, Seen, Step},
    seeding::Unwritten,
    sim::{Fault, REGION, World},
    table::CloneStatus,
    units::Sectors,
    volume::{Event, Record},
};
use tokio::sync::Notify;
use uuid::Uuid;

use super::{Kernel, PoolFacts, PoolUsage, StepError, Written};

/// One node of a simulated world.
pub(crate) struct FakeKernel {
    /// The world, shared with the other nodes' kernels and the test.
    pub(crate) world: Arc<Mutex<World>>,
    /// Which node this is.
    pub(crate) node: usize,
    /// Told when the process has died; its threads then stand still for ever.
    pub(crate) died: Arc<Notify>,
    /// What the pool is; none for a pool that is missing.
    pub(crate) pool: Option<PoolFacts>,
    /// The targets that this kernel has.
    pub(crate) targets: Vec<String>,
}

pub(crate) fn locked(world: &Mutex<World>) -> MutexGuard<'_, World> {
    world.lock().unwrap_or_else(PoisonError::into_inner)
}

/// A roomy, sound pool.
pub(crate) fn roomy_pool() -> PoolFacts {
    PoolFacts {
        size: 1 << 30,
        used: 0,
        free_outside: 1 << 30,
        chunk: 64 << 10,
        logical_block_size: 512,
        zeroes: true,
        errors_when_full: true,
    }
}

/// Every target that dmlocal uses.
pub(crate) fn every_target() -> Vec<String> {
    ["clone", "delay", "error", "linear", "multipath"].map(|t| format!("{t} 1.0.0")).into()
}

impl Kernel for FakeKernel {
    fn boot(&self) -> Uuid {
        locked(&self.world).nodes[self.node].boot
    }

    fn release(&self) -> String {
        "simulated".to_owned()
    }

    fn targets(&self) -> Result<Vec<String>, StepError> {
        Ok(self.targets.clone())
    }

    fn activate(&self, _: Option<&str>) -> Result<(), StepError> {
        locked(&self.world).activate(self.node);
        Ok(())
    }

    fn pool(&self, _: &str) -> Result<Option<PoolFacts>, StepError> {
        Ok(self.pool.clone())
    }

    #[expect(clippy::cast_precision_loss, reason = "a share")]
    fn pool_usage(&self, _: &str) -> Result<PoolUsage, StepError> {
        let pool = self.pool.as_ref().ok_or_else(|| StepError::Failed("no pool".to_owned()))?;
        let data = pool.used as f64 / pool.size as f64;
        Ok(PoolUsage { data, metadata: 0.0, zeroes: pool.zeroes })
    }

    fn port_is_free(&self, _: IpAddr, _: u16) -> bool {
        true
    }

    fn ours(&self) -> Result<Vec<String>, StepError> {
        Ok(locked(&self.world).devices(self.node))
    }

    fn look(&self, record: &Record) -> Result<Seen, StepError> {
        let seen = locked(&self.world).look(self.node, record);
        Ok(Seen { tuned: None, cache_dropped: false, announced: false, push: None, ..seen })
    }

    fn handle(&self, id: VolumeId) -> Result<Option<Device>, StepError> {
        Ok(locked(&self.world).handle(self.node, id))
    }

    fn held(&self, record: &Record) -> Result<u64, StepError> {
        Ok(locked(&self.world).look(self.node, record).held)
    }

    fn written(&self, record: &Record) -> Result<Option<Written>, StepError> {
        let done = locked(&self.world).written(self.node, record);
        Ok(done.map(|done| Written { done, under_way: 0 }))
    }

    fn apply(&self, record: &Record, step: &Step) -> Result<Option<Event>, StepError> {
        let outcome = locked(&self.world).apply(self.node, record, step);
        outcome.map_err(|fault| match fault {
            Fault::Crash => {
                self.died.notify_one();
                loop {
                    std::thread::park();
                }
            }
            Fault::Busy => StepError::Busy(format!("{step:?}")),
            Fault::Refused(why) => StepError::Failed(why),
            Fault::Mismatch(why) => StepError::Refused(why),
        })
    }

    fn allocated(&self, record: &Record) -> Option<Sectors> {
        locked(&self.world).look(self.node, record).allocated
    }

    fn allocation(&self, record: &Record, region: Sectors) -> Result<Unwritten, StepError> {
        assert_eq!(region, REGION);
        let outcome = locked(&self.world).allocation(self.node, record);
        outcome.map_err(|fault| StepError::Failed(format!("{fault:?}")))
    }

    fn committed(&self, record: &Record) -> Result<u64, StepError> {
        let mut world = locked(&self.world);
        world.commit(self.node, record);
        match world.look(self.node, record).clone_status {
            Some(CloneStatus::Working { hydrated, .. }) => Ok(hydrated),
            status => Err(StepError::Failed(format!("{status:?}"))),
        }
    }
}
