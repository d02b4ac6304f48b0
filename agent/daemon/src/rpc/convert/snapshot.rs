//! Snapshots as callers see them.

use dmlocal_model::volume::{Phase, ReceivingStage, Record, Taken};
use dmlocal_proto::v1;

use crate::{reconcile::View, service::bytes_left};

/// Whether something of it is still at its source.
fn hydrates(record: &Record) -> bool {
    let stage = record.receiving().map(|receiving| receiving.stage);
    matches!(stage, Some(ReceivingStage::Hydrating | ReceivingStage::Collapsing))
}

fn state(record: &Record, taken: &Taken) -> v1::SnapshotState {
    use ReceivingStage as R;
    use v1::SnapshotState as S;
    match &record.phase {
        Phase::Creating => S::Creating,
        Phase::Local if !taken.deferred => S::Available,
        Phase::Receiving(receiving) => match receiving.stage {
            R::Requesting | R::Forking => S::Creating,
            _ if taken.deferred => S::Deleting,
            R::Hydrating | R::Collapsing if receiving.failure.is_some() => S::Failed,
            R::Hydrating | R::Collapsing => S::Hydrating,
            // Whole; its source has not been told yet.
            R::Parting => S::Available,
            _ => S::Deleting,
        },
        Phase::Local
        | Phase::Lent(_)
        | Phase::Relaying(_)
        | Phase::Reverting(_)
        | Phase::Deleting => S::Deleting,
    }
}

/// A snapshot as callers see it; none for what is no snapshot.
pub(in crate::rpc) fn snapshot(view: &View, all: &[View]) -> Option<v1::Snapshot> {
    let record = &view.record;
    let taken = record.taken()?;
    let readers = all.iter().filter(|view| view.record.reads(record.id));
    Some(v1::Snapshot {
        id: record.id.to_string(),
        volume_id: taken.volume.to_string(),
        volume_incarnation: taken.incarnation.to_string(),
        size_bytes: record.size.bytes(),
        state: state(record, taken) as i32,
        pool: record.pool.clone(),
        logical_block_size: record.logical_block_size,
        created_s: taken.at,
        incarnation: record.incarnation.to_string(),
        read_by: readers.map(|view| view.record.id.to_string()).collect(),
        detail: view.detail.clone(),
        bytes_left: bytes_left(view).filter(|_| hydrates(record)),
        source_node: record
            .receiving()
            .filter(|_| hydrates(record))
            .map(|receiving| receiving.source.node.clone()),
    })
}
