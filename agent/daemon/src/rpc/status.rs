//! The one place where an error becomes a gRPC status.

use std::collections::HashMap;

use dmlocal_model::admit::Refusal;
use dmlocal_proto::ERROR_DOMAIN;
use tonic::{Code, Status};
use tonic_types::{ErrorDetails, StatusExt as _};

use crate::{kernel::StepError, peers::PeerError, reconcile::ServiceError};

/// The status that a caller sees, with a stable reason.
#[expect(clippy::needless_pass_by_value, reason = "made for map_err")]
pub(super) fn status(error: ServiceError) -> Status {
    let text = error.to_string();
    let (code, reason, metadata) = classify(&error);
    if matches!(code, Code::Internal | Code::DataLoss) {
        tracing::error!(%error, reason, "request failed");
    } else {
        tracing::info!(%error, reason, "request refused");
    }
    with_reason(code, reason, text, metadata)
}

/// A status with a stable reason.
pub(super) fn with_reason(
    code: Code,
    reason: &str,
    text: String,
    metadata: HashMap<String, String>,
) -> Status {
    let details = ErrorDetails::with_error_info(reason, ERROR_DOMAIN, metadata);
    Status::with_error_details(code, text, details)
}

fn classify(error: &ServiceError) -> (Code, &'static str, HashMap<String, String>) {
    let one = |key: &str, value: String| HashMap::from([(key.to_owned(), value)]);
    // No `_`: a new variant must decide what callers see.
    match error {
        ServiceError::Refused(refusal) => {
            (refusal_code(refusal), refusal.reason(), refusal_metadata(refusal))
        }
        ServiceError::Argument { field, .. } => {
            (Code::InvalidArgument, "ARGUMENT_INVALID", one("field", (*field).to_owned()))
        }
        ServiceError::Id(_) => (Code::InvalidArgument, "ID_INVALID", HashMap::new()),
        ServiceError::Step { step, source } => match source {
            StepError::Busy(path) => {
                (Code::FailedPrecondition, "HANDLE_IN_USE", one("path", path.clone()))
            }
            StepError::NoRoom(_) => (Code::ResourceExhausted, "NO_ROOM", HashMap::new()),
            StepError::Refused(_) | StepError::TimedOut(_) | StepError::Failed(_) => {
                (Code::Internal, "STEP_FAILED", one("step", step.clone()))
            }
        },
        ServiceError::Peer(PeerError::Unreachable { node, .. }) => {
            (Code::Unavailable, "SOURCE_UNREACHABLE", one("node", node.clone()))
        }
        ServiceError::Peer(PeerError::Refused { node, reason, .. }) => {
            // The peer's own reason, where it is one that this code knows.
            let known = [
                "GRANT_UNKNOWN",
                "GENERATION_STALE",
                "GRANT_FENCED",
                "SOURCE_ACTIVE",
                "ROLE_FORBIDDEN",
                "VOLUME_MOVING",
                "NO_ROOM",
                "POOL_MISSING",
                "PORTS_EXHAUSTED",
                "COPIES_EXHAUSTED",
            ]
            .into_iter()
            .find(|known| known == reason);
            (Code::FailedPrecondition, known.unwrap_or("PEER_REFUSED"), one("node", node.clone()))
        }
        ServiceError::SizeMismatch { .. } => {
            (Code::FailedPrecondition, "SIZE_MISMATCH", HashMap::new())
        }
        ServiceError::Journal(_) => (Code::Internal, "JOURNAL_FAILED", HashMap::new()),
        ServiceError::Internal(_) => (Code::Internal, "INTERNAL", HashMap::new()),
        ServiceError::Undo { cause, .. } => classify(cause),
    }
}

const fn refusal_code(refusal: &Refusal) -> Code {
    match refusal {
        Refusal::VolumeNotFound(_) | Refusal::PoolNotFound(_) | Refusal::SnapshotNotFound(_) => {
            Code::NotFound
        }
        Refusal::VolumeExists { .. }
        | Refusal::GrantExists { .. }
        | Refusal::SnapshotExists { .. } => Code::AlreadyExists,
        Refusal::SizeInvalid { .. }
        | Refusal::SizeSmaller { .. }
        | Refusal::SettingOutOfRange { .. }
        | Refusal::MoveToSelf(_) => Code::InvalidArgument,
        Refusal::NoRoom { .. } | Refusal::PortsExhausted | Refusal::CopiesExhausted { .. } => {
            Code::ResourceExhausted
        }
        Refusal::ChainTooDeep { .. } => Code::FailedPrecondition,
        Refusal::GrantUnknown(_) => Code::PermissionDenied,
        Refusal::LogicalBlockSize { .. }
        | Refusal::VolumeRemote { .. }
        | Refusal::AlwaysRemote { .. }
        | Refusal::SessionStale(_)
        | Refusal::GrantReturned(_)
        | Refusal::VolumeAttached(_)
        | Refusal::VolumePublished { .. }
        | Refusal::VolumeFenced { .. }
        | Refusal::VolumeMoving(_)
        | Refusal::VolumeReverting(_)
        | Refusal::SnapshotInUse { .. }
        | Refusal::SnapshotOfAnother { .. }
        | Refusal::PoolOfSource { .. }
        | Refusal::VolumeNotHeld(_)
        | Refusal::VolumeNotHydrating(_)
        | Refusal::VolumeFailed { .. }
        | Refusal::VolumeBusy { .. }
        | Refusal::GenerationStale { .. }
        | Refusal::GrantFenced(_)
        | Refusal::SourceActive(_)
        | Refusal::WrittenAtDestination { .. }
        | Refusal::PeerVersion { .. }
        | Refusal::PoolMissing { .. }
        | Refusal::HandleInUse { .. }
        | Refusal::ConfirmationRequired { .. }
        | Refusal::SourceAlive { .. }
        | Refusal::SourceAway { .. }
        | Refusal::SourceNotFenced(_)
        | Refusal::RegionsLost { .. }
        | Refusal::TargetMissing(_)
        | Refusal::AllocationUnknown { .. } => Code::FailedPrecondition,
    }
}

fn refusal_metadata(refusal: &Refusal) -> HashMap<String, String> {
    let pairs: Vec<(&str, String)> = match refusal {
        Refusal::VolumeNotFound(id)
        | Refusal::VolumeAttached(id)
        | Refusal::VolumeMoving(id)
        | Refusal::VolumeReverting(id)
        | Refusal::SnapshotNotFound(id)
        | Refusal::VolumeNotHeld(id)
        | Refusal::VolumeNotHydrating(id)
        | Refusal::SourceActive(id)
        | Refusal::SourceNotFenced(id) => vec![("id", id.to_string())],
        Refusal::VolumeExists { id, field } | Refusal::SnapshotExists { id, field } => {
            vec![("id", id.to_string()), ("field", (*field).to_owned())]
        }
        Refusal::SizeInvalid { size, block } => {
            vec![("size_bytes", size.to_string()), ("logical_block_size", block.to_string())]
        }
        Refusal::SizeSmaller { wanted, present } => {
            vec![("size_bytes", wanted.to_string()), ("present_bytes", present.to_string())]
        }
        Refusal::LogicalBlockSize { pool, volume } => {
            vec![("pool", pool.to_string()), ("volume", volume.to_string())]
        }
        Refusal::NoRoom { pool, needed, free } => vec![
            ("pool", pool.clone()),
            ("needed_bytes", needed.to_string()),
            ("free_bytes", free.to_string()),
        ],
        Refusal::VolumePublished { id, node }
        | Refusal::VolumeFenced { id, node }
        | Refusal::VolumeRemote { id, node }
        | Refusal::SourceAway { id, node }
        | Refusal::RegionsLost { id, node } => {
            vec![("id", id.to_string()), ("node", node.clone())]
        }
        Refusal::VolumeFailed { id, why } | Refusal::VolumeBusy { id, why } => {
            vec![("id", id.to_string()), ("why", why.clone())]
        }
        Refusal::MoveToSelf(node) | Refusal::SourceAlive { node } => vec![("node", node.clone())],
        Refusal::GenerationStale { present, named } => {
            vec![("present", present.to_string()), ("named", named.to_string())]
        }
        Refusal::AlwaysRemote { size, limit } => {
            vec![("size_bytes", size.to_string()), ("limit_bytes", limit.to_string())]
        }
        Refusal::GrantUnknown(grant)
        | Refusal::GrantFenced(grant)
        | Refusal::SessionStale(grant)
        | Refusal::GrantReturned(grant) => {
            vec![("grant_id", grant.to_string())]
        }
        Refusal::GrantExists { grant, field } => {
            vec![("grant_id", grant.to_string()), ("field", (*field).to_owned())]
        }
        Refusal::WrittenAtDestination { count } => vec![("count", count.to_string())],
        Refusal::PeerVersion { oldest, newest, ours } => vec![
            ("oldest", oldest.to_string()),
            ("newest", newest.to_string()),
            ("ours", ours.clone()),
        ],
        Refusal::SnapshotInUse { id, by } => {
            vec![("id", id.to_string()), ("volume_id", by.to_string())]
        }
        Refusal::SnapshotOfAnother { id, volume } => {
            vec![("id", id.to_string()), ("volume_id", volume.to_string())]
        }
        Refusal::PoolNotFound(pool) | Refusal::PoolOfSource { pool } => {
            vec![("pool", pool.clone())]
        }
        Refusal::PoolMissing { pool, why } => vec![("pool", pool.clone()), ("why", why.clone())],
        Refusal::HandleInUse { path } => vec![("path", path.clone())],
        Refusal::ConfirmationRequired { id, node, generation } => vec![
            ("id", id.to_string()),
            ("node", node.clone()),
            ("generation", generation.to_string()),
        ],
        Refusal::SettingOutOfRange { setting, range } => {
            vec![("setting", (*setting).to_owned()), ("range", range.clone())]
        }
        Refusal::ChainTooDeep { depth, limit } => {
            vec![("depth", depth.to_string()), ("limit", limit.to_string())]
        }
        Refusal::PortsExhausted => vec![],
        Refusal::CopiesExhausted { id, limit } => {
            vec![("id", id.to_string()), ("limit", limit.to_string())]
        }
        Refusal::TargetMissing(target) => vec![("target", target.clone())],
        Refusal::AllocationUnknown { id, why } => {
            vec![("id", id.to_string()), ("why", why.clone())]
        }
    };
    pairs.into_iter().map(|(key, value)| (key.to_owned(), value)).collect()
}
