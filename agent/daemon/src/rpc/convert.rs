//! Messages to domain values and back. Nothing is decided here.

mod snapshot;
#[cfg(test)]
mod test;

use std::time::{SystemTime, UNIX_EPOCH};

use dmlocal_model::{
    admit::{Claim, CopyRequest, Offer, Refusal, Which},
    hydration,
    name::{DmName, Generation, NQN_PREFIX, Role, VolumeId, canonical_uuid, is_nqn},
    seeding::AllocationMap,
    table::CloneStatus,
    units::Sectors,
    volume::{ExportName, LentStage, Origin, Phase, Receiving, ReceivingStage, Record, Source},
};
use dmlocal_proto::{API_VERSION, OLDEST_API_VERSION, v1};
use uuid::Uuid;

pub(super) use self::snapshot::snapshot;
use crate::{
    reconcile::{ServiceError, View},
    service::{Forgotten, Mode, bytes_left, lost},
};

/// Longest endpoint, node name or NQN that is taken from a caller (NVMe base
/// specification 2.0, 4.5: an NQN has at most 223 bytes).
const MAX_TEXT: usize = 253;

pub(super) fn volume_id(text: &str) -> Result<VolumeId, ServiceError> {
    text.parse()
        .map_err(|error: dmlocal_model::name::InvalidId| ServiceError::Id(error.to_string()))
}

pub(super) fn uuid(field: &'static str, text: &str) -> Result<Uuid, ServiceError> {
    canonical_uuid(text)
        .map_err(|error| ServiceError::Argument { field, problem: error.to_string() })
}

/// Text from a caller that ends up in the kernel's option strings: nothing that
/// could end one option and begin another.
pub(super) fn word(field: &'static str, text: &str) -> Result<String, ServiceError> {
    let plain = |byte: u8| byte.is_ascii_graphic() && !b",'\"\\".contains(&byte);
    if text.is_empty() || text.len() > MAX_TEXT || !text.bytes().all(plain) {
        return Err(ServiceError::Argument {
            field,
            problem: format!("must be 1 to {MAX_TEXT} printable characters without `,`"),
        });
    }
    Ok(text.to_owned())
}

/// Name of a subsystem of dmlocal's: it is connected and disconnected by it.
fn nqn(field: &'static str, text: &str) -> Result<String, ServiceError> {
    match is_nqn(text) {
        true => Ok(text.to_owned()),
        false => {
            let problem = format!("must be {NQN_PREFIX} and a UUID");
            Err(ServiceError::Argument { field, problem })
        }
    }
}

/// URL of an agent.
pub(super) fn endpoint(field: &'static str, text: &str) -> Result<String, ServiceError> {
    let text = word(field, text)?;
    if text.starts_with("https://") {
        return Ok(text);
    }
    Err(ServiceError::Argument { field, problem: "must be an https:// URL".into() })
}

pub(super) fn which(
    id: &str,
    generation: Option<u64>,
    incarnation: Option<&str>,
) -> Result<Which, ServiceError> {
    Ok(Which {
        id: volume_id(id)?,
        generation: generation.map(Generation),
        incarnation: incarnation.map(|text| uuid("incarnation", text)).transpose()?,
    })
}

pub(super) fn claim(
    grant: &str,
    incarnation: &str,
    generation: u64,
) -> Result<Claim, ServiceError> {
    Ok(Claim {
        grant: uuid("grant_id", grant)?,
        incarnation: uuid("incarnation", incarnation)?,
        generation: Generation(generation),
        session: 0,
    })
}

pub(super) fn copy_request(request: &v1::GrantCopyRequest) -> Result<CopyRequest, ServiceError> {
    let (grant, incarnation) = (&request.volume_grant_id, &request.volume_incarnation);
    Ok(CopyRequest {
        id: volume_id(&request.id)?,
        incarnation: uuid("incarnation", &request.incarnation)?,
        grant: uuid("grant_id", &request.grant_id)?,
        volume: volume_id(&request.volume_id)?,
        claim: claim(grant, incarnation, request.volume_generation)?,
    })
}

/// Region size of a copy, within dm-clone's limits (`MIN_REGION_SIZE` and
/// `MAX_REGION_SIZE` of drivers/md/dm-clone-target.c: 2^3 and 2^21 sectors).
pub(super) fn region(bytes: u64) -> Result<Sectors, ServiceError> {
    if bytes.is_power_of_two() && (1 << 12..=1 << 30).contains(&bytes) {
        return Ok(Sectors::from_bytes(bytes));
    }
    let problem = "must be a power of two from 4096 to 2^30".to_owned();
    Err(ServiceError::Argument { field: "region_bytes", problem })
}

pub(super) fn allocation(map: &AllocationMap) -> v1::Allocation {
    v1::Allocation {
        grant_id: map.grant.to_string(),
        incarnation: map.incarnation.to_string(),
        generation: map.generation.0,
        size_bytes: map.length.bytes(),
        region_bytes: map.region.bytes(),
        unwritten: map.unwritten.words(),
    }
}

pub(super) fn grant(record: &Record, node: &str, endpoint: &str) -> Option<v1::Grant> {
    let lent = record.lent()?;
    Some(v1::Grant {
        id: lent.to.grant.to_string(),
        volume_id: record.id.to_string(),
        incarnation: record.incarnation.to_string(),
        generation: record.generation.0,
        size_bytes: record.size.bytes(),
        logical_block_size: record.logical_block_size,
        source_node: node.to_owned(),
        source_endpoint: endpoint.to_owned(),
        node: lent.to.node.clone(),
        hold: lent.hold,
        address: lent.export.address.clone(),
        port: u32::from(lent.export.port),
        subsystem_nqn: lent.export.subsystem_nqn.clone(),
        namespace_uuid: lent.export.namespace_uuid.to_string(),
        namespace_nguid: lent.export.namespace_nguid.to_string(),
        api_version: API_VERSION,
        oldest_api_version: OLDEST_API_VERSION,
        depth: record.receiving().map_or(1, |receiving| receiving.source.depth.saturating_add(1)),
        source: record.lineage.made_of.map(made_of),
        begins: record.lineage.passing,
    })
}

/// Where the data of a received volume is going to be.
pub(super) fn mode(mode: i32) -> Result<Mode, ServiceError> {
    match v1::ReceiveMode::try_from(mode) {
        Ok(v1::ReceiveMode::Unspecified) => Ok(Mode::Auto),
        Ok(v1::ReceiveMode::Local) => Ok(Mode::Local),
        Ok(v1::ReceiveMode::Remote) => Ok(Mode::Remote),
        Err(_) => Err(ServiceError::Argument { field: "mode", problem: "is unknown".into() }),
    }
}

/// What a grant offers to this node.
///
/// # Errors
/// It is malformed, was given to another node, or comes from one whose interface
/// this node does not speak.
pub(super) fn offer(grant: v1::Grant, this_node: &str) -> Result<Offer, ServiceError> {
    let id = uuid("grant.id", &grant.id)?;
    if grant.api_version < OLDEST_API_VERSION || grant.oldest_api_version > API_VERSION {
        return Err(Refusal::PeerVersion {
            oldest: grant.oldest_api_version,
            newest: grant.api_version,
            ours: format!("{OLDEST_API_VERSION} to {API_VERSION}"),
        }
        .into());
    }
    if grant.node != this_node {
        return Err(Refusal::GrantUnknown(id).into());
    }
    let argument =
        |field, problem: &str| ServiceError::Argument { field, problem: problem.to_owned() };
    let address = word("grant.address", &grant.address)?;
    address
        .parse::<std::net::IpAddr>()
        .map_err(|_| argument("grant.address", "must be an IP address"))?;
    let port = u16::try_from(grant.port)
        .ok()
        .filter(|port| *port > 0)
        .ok_or_else(|| argument("grant.port", "must be a TCP port"))?;
    if grant.generation == 0 {
        return Err(argument("grant.generation", "must be at least 1"));
    }
    Ok(Offer {
        id: volume_id(&grant.volume_id)?,
        incarnation: uuid("grant.incarnation", &grant.incarnation)?,
        size: grant.size_bytes,
        logical_block_size: grant.logical_block_size,
        made_of: grant.source.map(|source| origin("grant.source", source)).transpose()?,
        begins: grant.begins,
        source: Source {
            grant: id,
            node: word("grant.source_node", &grant.source_node)?,
            endpoint: endpoint("grant.source_endpoint", &grant.source_endpoint)?,
            generation: Generation(grant.generation),
            hold: grant.hold,
            depth: grant.depth.max(1),
            export: ExportName {
                subsystem_nqn: nqn("grant.subsystem_nqn", &grant.subsystem_nqn)?,
                namespace_uuid: uuid("grant.namespace_uuid", &grant.namespace_uuid)?,
                namespace_nguid: uuid("grant.namespace_nguid", &grant.namespace_nguid)?,
                address,
                port,
            },
        },
    })
}

fn state(view: &View) -> v1::VolumeState {
    use v1::VolumeState as S;
    let lent = |stage| match stage {
        LentStage::Published | LentStage::Revoking => S::Published,
        LentStage::Fencing
        | LentStage::Fenced
        | LentStage::Yielding
        | LentStage::Serving
        | LentStage::Reclaiming => S::Fenced,
        LentStage::Releasing => S::Releasing,
    };
    let receiving = match &view.record.phase {
        Phase::Creating | Phase::Local | Phase::Reverting(_) => return S::Local,
        Phase::Deleting => return S::Releasing,
        Phase::Lent(to) => return lent(to.stage),
        Phase::Receiving(receiving) => receiving,
        Phase::Relaying(relay) if relay.lent.stage.is_closed() => return lent(relay.lent.stage),
        // As long as this node is its home, what it lacks says more.
        Phase::Relaying(relay) => &relay.receiving,
    };
    if receiving.failure.is_some() { S::Failed } else { received(view, receiving) }
}

/// How a received copy stands, or stood when it failed.
fn received(view: &View, receiving: &Receiving) -> v1::VolumeState {
    use v1::VolumeState as S;
    match receiving.stage {
        ReceivingStage::Remote
        | ReceivingStage::Localizing
        | ReceivingStage::Building
        | ReceivingStage::Clearing
        | ReceivingStage::Settling => S::Remote,
        ReceivingStage::Linking
        | ReceivingStage::Requesting
        | ReceivingStage::Forking
        | ReceivingStage::Allocating
        | ReceivingStage::Zeroing
        | ReceivingStage::Assembling
        | ReceivingStage::Held
        | ReceivingStage::Refused
        | ReceivingStage::Switching => S::Held,
        ReceivingStage::Hydrating if receiving.forgotten => S::Damaged,
        ReceivingStage::Hydrating if view.stalled_since.is_some() => S::Stalled,
        ReceivingStage::Hydrating => S::Hydrating,
        ReceivingStage::Collapsing | ReceivingStage::Parting => S::Collapsing,
        ReceivingStage::Aborting
        | ReceivingStage::Withdrawing
        | ReceivingStage::Discarding
        | ReceivingStage::Discarded
        | ReceivingStage::Returning => S::Releasing,
    }
}

/// A volume as callers see it.
pub(super) fn volume(view: &View) -> v1::Volume {
    let record = &view.record;
    let receiving = record.receiving();
    let lent = record.lent();
    let lost = lost(view);
    let bytes_left = bytes_left(view);
    // What has no copy here, or not yet, has none that grows.
    let copied = receiving.filter(|receiving| receiving.remote.is_none());
    let percent = copied.map(|receiving| {
        let total = hydration::regions(receiving.length, receiving.region);
        let here = match view.seen.as_ref().and_then(|seen| seen.clone_status.as_ref()) {
            _ if bytes_left == Some(0) => total,
            Some(CloneStatus::Working { hydrated, .. }) => *hydrated,
            Some(CloneStatus::Failed) | None => receiving.floor,
        };
        #[expect(clippy::cast_precision_loss, reason = "a share to show")]
        let share = 100.0 * here as f64 / total.max(1) as f64;
        (share * 100.0).floor() / 100.0
    });
    let rate = receiving.filter(|receiving| !receiving.forgotten).and(view.rate);
    let eta = match (bytes_left, rate) {
        (Some(left), Some(rate)) if rate > 0 => Some(left.div_ceil(rate)),
        _ => None,
    };
    let here = view.seen.as_ref().is_some_and(|seen| {
        seen.handle.as_ref().is_some_and(|handle| handle.table.is_some() && !handle.leaving)
    });
    v1::Volume {
        id: record.id.to_string(),
        size_bytes: record.size.bytes(),
        state: state(view) as i32,
        attached: record.attached,
        device_path: (record.attached && here)
            .then(|| DmName::new(record.id, record.generation, Role::Handle).path()),
        percent,
        bytes_left: bytes_left.filter(|_| lost.is_none()),
        rate_bytes_per_s: rate,
        eta_s: eta,
        source_node: receiving
            .filter(|receiving| !receiving.forgotten)
            .map(|receiving| receiving.source.node.clone()),
        generation: record.generation.0,
        detail: view.detail.clone(),
        pool: record.pool.clone(),
        logical_block_size: record.logical_block_size,
        // Of one that is received and lent at once, whoever it goes on to has to find it.
        grant_id: lent
            .map(|lent| lent.to.grant)
            .or_else(|| receiving.map(|receiving| receiving.source.grant))
            .map(|grant| grant.to_string()),
        peer_node: lent.map(|lent| lent.to.node.clone()),
        incarnation: record.incarnation.to_string(),
        region_bytes: copied.map(|receiving| receiving.region.bytes()),
        hydration: copied.map(|_| v1::Hydration {
            paused: record.tuning.paused,
            rate_bytes_per_s: record.tuning.rate,
            threshold: record.tuning.threshold,
            batch: record.tuning.batch,
            priority: record.tuning.priority,
        }),
        stalled_since_s: view.stalled_since.map(seconds),
        held_writes: receiving
            .filter(|receiving| received(view, receiving) == v1::VolumeState::Held)
            .map(|_| view.seen.as_ref().map_or(0, |seen| seen.held)),
        bytes_lost: lost.map(|lost| lost.bytes),
        source: record.lineage.made_of.map(made_of),
        allocated_bytes: view.seen.as_ref().and_then(|seen| seen.allocated).map(Sectors::bytes),
    }
}

/// What was given up with a source, as callers see it.
pub(super) fn forgotten(forgotten: &Forgotten) -> v1::ForgetSourceResponse {
    v1::ForgetSourceResponse {
        volume: forgotten.view.as_ref().map(volume),
        bytes_lost: forgotten.lost.bytes,
        regions_lost: forgotten.lost.regions,
    }
}

fn made_of(origin: Origin) -> v1::Origin {
    match origin {
        Origin::Snapshot(id) => v1::Origin { snapshot_id: Some(id.to_string()), volume_id: None },
        Origin::Volume(id) => v1::Origin { snapshot_id: None, volume_id: Some(id.to_string()) },
    }
}

/// What a volume is to be made of.
pub(super) fn origin(field: &'static str, source: v1::Origin) -> Result<Origin, ServiceError> {
    match (source.snapshot_id, source.volume_id) {
        (Some(id), None) => Ok(Origin::Snapshot(volume_id(&id)?)),
        (None, Some(id)) => Ok(Origin::Volume(volume_id(&id)?)),
        (None, None) | (Some(_), Some(_)) => {
            let problem = "must name a snapshot or a volume".to_owned();
            Err(ServiceError::Argument { field, problem })
        }
    }
}

fn seconds(time: SystemTime) -> u64 {
    time.duration_since(UNIX_EPOCH).map_or(0, |since| since.as_secs())
}
