//! A volume made of a snapshot or of another volume.
//!
//! ```text
//!   on the node that has it ──→ Create
//!   on another node:
//!     Get at the destination ── it is there already, made of that ──→ done
//!        │
//!     Grant at the source, which makes a copy for this grant
//!        │
//!     Receive at the destination: as for a move
//! ```

use dmlocal_proto::v1::{CreateVolumeRequest, GetVolumeRequest, Origin, ReceiveMode, Volume};

use crate::{
    args::{Global, check_id},
    client::{Agent, Endpoint},
    error::{Failure, reason},
    moving,
};

/// Makes the volume on the node of the global endpoint.
pub(crate) async fn run(
    global: &Global,
    id: &str,
    source: Origin,
    from: Option<&Endpoint>,
    pool: &str,
) -> Result<Volume, Failure> {
    check_id(id)?;
    source.snapshot_id.as_deref().map_or(Ok(()), check_id)?;
    source.volume_id.as_deref().map_or(Ok(()), check_id)?;
    let here = Agent::connect(&global.endpoint, global).await?;
    if let Some(from) = from {
        let there = Agent::connect(from, global).await?;
        let (node, source_node) = tokio::try_join!(here.node(), there.node())?;
        if node.name != source_node.name {
            if let Some(made) = made_before(&here, id, &source).await? {
                return Ok(made);
            }
            let order = moving::Move {
                id,
                from,
                to: &global.endpoint,
                hold: false,
                wait: false,
                pool,
                mode: ReceiveMode::Unspecified,
                source: Some(&source),
            };
            return moving::between(order, (&there, &source_node), (&here, &node)).await;
        }
    }
    let (id, pool) = (id.to_owned(), pool.to_owned());
    let ask = CreateVolumeRequest { id, size_bytes: 0, pool, source: Some(source) };
    Ok(here.ask(here.volumes().create(ask)).await?)
}

/// The volume, if an earlier command has made it; one of another content is in the
/// way.
async fn made_before(here: &Agent, id: &str, source: &Origin) -> Result<Option<Volume>, Failure> {
    let ask = GetVolumeRequest { id: id.to_owned() };
    match here.ask(here.volumes().get(ask)).await {
        Ok(volume) if volume.source.as_ref() == Some(source) => Ok(Some(volume)),
        Ok(_) => {
            let text = format!("volume {id} exists with a different source");
            Err(Failure::new(reason::VOLUME_EXISTS, text).with("id", id).with("field", "source"))
        }
        Err(error) if error.answered && error.failure.reason == reason::VOLUME_NOT_FOUND => {
            Ok(None)
        }
        Err(error) => Err(error.failure),
    }
}
