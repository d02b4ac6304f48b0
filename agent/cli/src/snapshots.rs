//! `snapshot …`

use dmlocal_proto::v1::{
    CreateSnapshotRequest, DeleteSnapshotRequest, ListSnapshotsRequest, Snapshot,
};

use crate::{
    args::{Global, Output, SnapshotCommand, check_id},
    commands::{connect, print_done},
    error::Failure,
    output,
};

/// Runs one command about snapshots.
pub(crate) async fn run(global: &Global, command: &SnapshotCommand) -> Result<(), Failure> {
    match command {
        SnapshotCommand::Create { id, volume } => {
            check_id(id)?;
            check_id(volume)?;
            let agent = connect(global).await?;
            let ask = CreateSnapshotRequest { id: id.clone(), volume_id: volume.clone() };
            let snapshot: Snapshot = agent.ask(agent.snapshots().create(ask)).await?;
            match global.output {
                Output::Json => output::print_json(&snapshot)?,
                Output::Table => output::print(&format!("{}\n", snapshot.id))?,
            };
            Ok(())
        }
        SnapshotCommand::List => {
            let agent = connect(global).await?;
            let listed = agent.ask(agent.snapshots().list(ListSnapshotsRequest {})).await?;
            match global.output {
                Output::Json => output::print_json(&listed.snapshots)?,
                Output::Table => output::print(&output::snapshots(&listed.snapshots))?,
            };
            Ok(())
        }
        SnapshotCommand::Delete { id, defer, incarnation } => {
            check_id(id)?;
            let agent = connect(global).await?;
            let (defer, incarnation) = (*defer, incarnation.clone());
            let ask = DeleteSnapshotRequest { id: id.clone(), defer, incarnation };
            agent.ask(agent.snapshots().delete(ask)).await?;
            print_done(global)
        }
    }
}
