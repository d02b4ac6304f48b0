//! The first half of a move: everything after it is between the two agents.
//!
//! ```text
//!   GetNode at both ── same node ──→ refused
//!      │
//!   Grant at the source ── no answer ──→ revoke: nobody has used it
//!      │
//!   Receive at the destination
//!      ├─ refused ──→ revoke at the source, report the refusal
//!      ├─ no answer ──→ report; the grant stays, the volume may be there
//!      └─ received ──→ print the device; with --wait, until it has arrived
//! ```

use std::{
    io::{self, IsTerminal as _, Write as _},
    time::Duration,
};

use dmlocal_proto::v1::{
    GetVolumeRequest, Grant, GrantRequest, Node, Origin, ReceiveMode, ReceiveRequest,
    RevokeRequest, Volume, VolumeState,
};
use tokio::time::{Instant, sleep};
use uuid::Uuid;

use crate::{
    args::{Global, Output, check_id},
    client::{Agent, CallError, Endpoint},
    error::{Failure, reason},
    output,
};

/// How often `--wait` asks.
const POLL_INTERVAL: Duration = Duration::from_millis(500);

/// A move that was asked for.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Move<'a> {
    /// The volume.
    pub(crate) id: &'a str,
    /// The source's agent.
    pub(crate) from: &'a Endpoint,
    /// The destination's agent.
    pub(crate) to: &'a Endpoint,
    /// Whether the source stays writable until the switch.
    pub(crate) hold: bool,
    /// Whether to wait until the volume has arrived.
    pub(crate) wait: bool,
    /// The destination's pool; empty for its first.
    pub(crate) pool: &'a str,
    /// Where the data is going to be.
    pub(crate) mode: ReceiveMode,
    /// What the volume is new from; none for one that moves.
    pub(crate) source: Option<&'a Origin>,
}

/// Moves a volume and prints its device at the destination.
pub(crate) async fn run(global: &Global, order: Move<'_>) -> Result<(), Failure> {
    check_id(order.id)?;
    let (source, destination) =
        tokio::try_join!(Agent::connect(order.from, global), Agent::connect(order.to, global))?;
    let (source_node, destination_node) = tokio::try_join!(source.node(), destination.node())?;
    if source_node.name == destination_node.name {
        let text = format!("both endpoints are node {}", source_node.name);
        return Err(Failure::new(reason::MOVE_TO_SELF, text).with("node", source_node.name));
    }
    let ends = ((&source, &source_node), (&destination, &destination_node));
    let received = between(order, ends.0, ends.1).await?;
    // The device is usable now: whoever waits for the path need not wait for the
    // copy.
    if global.output == Output::Table {
        output::print(&device_line(&received))?;
    }
    let volume = if order.wait { arrival(&destination, order, received).await? } else { received };
    if global.output == Output::Json {
        output::print_json(&volume)?;
    }
    Ok(())
}

/// Asks the one for a grant and the other to receive it.
pub(crate) async fn between(
    order: Move<'_>,
    (source, source_node): (&Agent, &Node),
    (destination, destination_node): (&Agent, &Node),
) -> Result<Volume, Failure> {
    let grant = grant(source, destination_node, order).await?;
    let ask = ReceiveRequest {
        grant: Some(grant.clone()),
        pool: order.pool.to_owned(),
        mode: order.mode.into(),
    };
    match destination.ask(destination.moves().receive(ask)).await {
        Ok(volume) => Ok(volume),
        Err(error) if error.answered => {
            Err(revoke_after(source, source_node, order.id, &grant.id, error.failure).await)
        }
        Err(error) => Err(uncertain(order, &grant.id, source_node, destination_node, error)),
    }
}

/// The device's path on a line.
pub(crate) fn device_line(volume: &Volume) -> String {
    volume.device_path.as_deref().map(|path| format!("{path}\n")).unwrap_or_default()
}

/// Asks the source for a grant under a fresh id.
async fn grant(source: &Agent, to: &Node, order: Move<'_>) -> Result<Grant, Failure> {
    let grant_id = Uuid::new_v4().to_string();
    let ask = GrantRequest {
        id: order.id.to_owned(),
        grant_id: grant_id.clone(),
        node: to.name.clone(),
        host_nqn: to.host_nqn.clone(),
        hold: order.hold,
        endpoint: to.endpoint.clone(),
        source: order.source.cloned(),
    };
    match source.ask(source.moves().grant(ask)).await {
        Ok(grant) => Ok(grant),
        Err(error) if error.answered => Err(error.failure),
        // The grant may exist, but nobody was told of it.
        Err(error) => {
            let failure = error.failure.with("grant_id", &grant_id);
            match revoke(source, order.id, &grant_id).await {
                Ok(()) => Err(failure),
                Err(undo) => Err(stuck(failure, &undo, order.id, &grant_id)),
            }
        }
    }
}

/// Revokes a grant; one that never came to be or is over counts as revoked.
async fn revoke(source: &Agent, volume_id: &str, grant_id: &str) -> Result<(), Failure> {
    let ask = RevokeRequest { volume_id: volume_id.to_owned(), grant_id: grant_id.to_owned() };
    match source.ask(source.moves().revoke(ask)).await {
        Ok(_) => Ok(()),
        Err(error) if error.answered && error.failure.reason == reason::GRANT_UNKNOWN => Ok(()),
        Err(error) => Err(error.failure),
    }
}

/// Gives the grant back after the destination has refused it.
async fn revoke_after(
    source: &Agent,
    source_node: &Node,
    volume_id: &str,
    grant_id: &str,
    refusal: Failure,
) -> Failure {
    match revoke(source, volume_id, grant_id).await {
        Ok(()) => refusal,
        Err(undo) => {
            stuck(refusal, &undo, volume_id, grant_id).with("source_node", &source_node.name)
        }
    }
}

/// A failure whose undoing failed too: both are told.
fn stuck(mut failure: Failure, undo: &Failure, volume_id: &str, grant_id: &str) -> Failure {
    failure.message = format!(
        "{}; revoking grant {grant_id} of volume {volume_id} at the source failed too: {undo}",
        failure.message
    );
    failure
        .with("grant_id", grant_id)
        .with("revoke_reason", &undo.reason)
        .with("revoke_message", &undo.message)
}

/// Nobody knows whether the destination has the volume. Revoking could take the
/// source away from a copy that is in use, so it is left to whoever can look.
fn uncertain(
    order: Move<'_>,
    grant_id: &str,
    source: &Node,
    destination: &Node,
    error: CallError,
) -> Failure {
    let Move { id, from, to, .. } = order;
    let text = format!(
        "{} did not say whether it has received the volume: {}. Grant {grant_id} stays. Look with \
         `dmlocalctl --endpoint {to} status {id}`: if the volume is there, the move goes on by \
         itself; if the node answers VOLUME_NOT_FOUND, withdraw the grant with `dmlocalctl \
         --endpoint {from} volume abort {id}`",
        destination.name, error.failure.message
    );
    Failure::new(reason::MOVE_UNCERTAIN, text)
        .with("id", id)
        .with("grant_id", grant_id)
        .with("source_node", &source.name)
        .with("destination_node", &destination.name)
        .with("cause", error.failure.reason)
}

/// What a volume's state means to somebody who waits for it.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
enum Progress {
    Arrived,
    UnderWay,
    Failed,
}

fn progress(state: i32, hold: bool) -> Progress {
    use VolumeState::*;
    match VolumeState::try_from(state).unwrap_or(Unspecified) {
        // It stays where it is until somebody says otherwise, or there is room.
        Local | Remote => Progress::Arrived,
        Failed | Damaged => Progress::Failed,
        // Whoever waits for a held volume may find it switched already.
        Held | Hydrating | Collapsing | Stalled if hold => Progress::Arrived,
        Held | Hydrating | Collapsing | Stalled => Progress::UnderWay,
        Unspecified | Published | Fenced | Releasing => Progress::UnderWay,
    }
}

/// Polls the destination until the volume has arrived. An agent that does not
/// answer for a while, as during an upgrade, is asked again until the deadline.
async fn arrival(agent: &Agent, order: Move<'_>, first: Volume) -> Result<Volume, Failure> {
    let mut meter = Meter { live: io::stderr().is_terminal() };
    let mut volume = first;
    let mut answered = Instant::now();
    loop {
        match progress(volume.state, order.hold) {
            Progress::Arrived => return Ok(volume),
            Progress::Failed => {
                let text = format!("volume {} failed: {}", order.id, volume.detail);
                return Err(Failure::new(reason::VOLUME_FAILED, text).with("id", order.id));
            }
            Progress::UnderWay => meter.show(&volume),
        }
        sleep(POLL_INTERVAL).await;
        let ask = GetVolumeRequest { id: order.id.to_owned() };
        match agent.ask(agent.volumes().get(ask)).await {
            Ok(next) => {
                volume = next;
                answered = Instant::now();
            }
            Err(error) if !error.answered && answered.elapsed() < agent.deadline() => {}
            Err(error) => return Err(error.failure),
        }
    }
}

/// A progress line on standard error, only where a person sees it.
struct Meter {
    live: bool,
}

impl Meter {
    fn show(&mut self, volume: &Volume) {
        if self.live {
            // Progress that nobody can see is no reason to stop.
            let _ = write!(io::stderr(), "\r\x1b[K{}", output::progress(volume));
        }
    }
}

impl Drop for Meter {
    fn drop(&mut self) {
        if self.live {
            let _ = write!(io::stderr(), "\r\x1b[K");
        }
    }
}

#[cfg(test)]
mod test {
    use dmlocal_proto::v1::VolumeState;

    use super::{Progress, progress};

    #[test]
    fn waiting_ends_when_local_or_failed_and_for_a_held_move_when_held() {
        use VolumeState::*;
        let table = [
            (Local, Progress::Arrived, Progress::Arrived),
            (Held, Progress::UnderWay, Progress::Arrived),
            (Hydrating, Progress::UnderWay, Progress::Arrived),
            (Collapsing, Progress::UnderWay, Progress::Arrived),
            (Stalled, Progress::UnderWay, Progress::Arrived),
            (Releasing, Progress::UnderWay, Progress::UnderWay),
            (Unspecified, Progress::UnderWay, Progress::UnderWay),
            (Remote, Progress::Arrived, Progress::Arrived),
            (Failed, Progress::Failed, Progress::Failed),
            (Damaged, Progress::Failed, Progress::Failed),
        ];
        for (state, whole, held) in table {
            assert_eq!(progress(state.into(), false), whole, "{state:?}");
            assert_eq!(progress(state.into(), true), held, "{state:?} with --hold");
        }
    }
}
