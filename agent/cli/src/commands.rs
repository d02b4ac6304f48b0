//! What each command does.

use std::{fs, path::Path};

use clap::CommandFactory as _;
use dmlocal_proto::v1::{
    AbortRequest, AttachVolumeRequest, CreateVolumeRequest, DeleteVolumeRequest,
    DetachVolumeRequest, ExtendVolumeRequest, ForgetSourceRequest, GetVolumeRequest,
    ListPoolsRequest, ListVolumesRequest, LocalizeRequest, Origin, PauseHydrationRequest,
    ReceiveMode, ReclaimRequest, ResumeHydrationRequest, RevertVolumeRequest, SwitchRequest,
    TuneHydrationRequest, Volume,
};

use crate::{
    args::{
        Cli, Command, Global, HookCommand, HydrationCommand, NodeCommand, Output, PkiCommand,
        PoolCommand, VolumeCommand, Which, check_id,
    },
    client::Agent,
    copying,
    error::{Failure, reason},
    hook, moving, output, pki, snapshots, watch,
};

/// Runs one command to its end.
pub(crate) fn run(cli: &Cli) -> Result<(), Failure> {
    let global = &cli.global;
    match &cli.command {
        Command::Pki(command) => certificates(global, command),
        Command::Completions { shell } => completions(*shell),
        Command::Man { dir } => man(dir),
        Command::Hook(HookCommand::Libvirt(arguments)) => {
            let told = online(async {
                hook::libvirt(global, arguments).await;
                Ok(())
            });
            // No failure of ours may keep a hypervisor from its work.
            told.or(Ok(()))
        }
        Command::Status { id, watch } => online(status(global, id.as_deref(), *watch)),
        Command::Pool(PoolCommand::List) => online(pools(global)),
        Command::Node(NodeCommand::Show) => online(node(global)),
        Command::Hydration(command) => online(hydration(global, command)),
        Command::Snapshot(command) => online(snapshots::run(global, command)),
        Command::Volume(command) => online(volume(global, command)),
    }
}

/// Runs what talks to agents.
fn online(work: impl Future<Output = Result<(), Failure>>) -> Result<(), Failure> {
    tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .map_err(|error| Failure::new(reason::INTERNAL, format!("starting: {error}")))?
        .block_on(work)
}

pub(crate) async fn connect(global: &Global) -> Result<Agent, Failure> {
    Agent::connect(&global.endpoint, global).await
}

async fn status(global: &Global, id: Option<&str>, watch: bool) -> Result<(), Failure> {
    id.map_or(Ok(()), check_id)?;
    let agent = connect(global).await?;
    if watch {
        return watch::run(&agent, id, global.output).await;
    }
    let volumes = match id {
        None => list(&agent).await?,
        Some(id) => {
            let ask = GetVolumeRequest { id: id.to_owned() };
            vec![agent.ask(agent.volumes().get(ask)).await?]
        }
    };
    print_volumes(global, &volumes)
}

async fn list(agent: &Agent) -> Result<Vec<Volume>, Failure> {
    Ok(agent.ask(agent.volumes().list(ListVolumesRequest {})).await?.volumes)
}

fn print_volumes(global: &Global, volumes: &[Volume]) -> Result<(), Failure> {
    match global.output {
        Output::Json => output::print_json(volumes)?,
        Output::Table => output::print(&output::volumes(volumes))?,
    };
    Ok(())
}

/// Prints one volume: as an object, or as the text that the command has for
/// people.
fn print_volume(
    global: &Global,
    volume: &Volume,
    text: impl FnOnce(&Volume) -> String,
) -> Result<(), Failure> {
    match global.output {
        Output::Json => output::print_json(volume)?,
        Output::Table => output::print(&text(volume))?,
    };
    Ok(())
}

/// Prints an empty answer: an empty object, or nothing.
pub(crate) fn print_done(global: &Global) -> Result<(), Failure> {
    if global.output == Output::Json {
        output::print("{}\n")?;
    }
    Ok(())
}

async fn pools(global: &Global) -> Result<(), Failure> {
    let agent = connect(global).await?;
    let pools = agent.ask(agent.nodes().list_pools(ListPoolsRequest {})).await?.pools;
    match global.output {
        Output::Json => output::print_json(&pools)?,
        Output::Table => output::print(&output::pools(&pools))?,
    };
    Ok(())
}

async fn node(global: &Global) -> Result<(), Failure> {
    let agent = connect(global).await?;
    let node = agent.node().await?;
    match global.output {
        Output::Json => output::print_json(&node)?,
        Output::Table => output::print(&output::node(&node))?,
    };
    Ok(())
}

async fn volume(global: &Global, command: &VolumeCommand) -> Result<(), Failure> {
    let row = |volume: &Volume| output::volumes(std::slice::from_ref(volume));
    let silent = |_: &Volume| String::new();
    match command {
        VolumeCommand::List => {
            let agent = connect(global).await?;
            print_volumes(global, &list(&agent).await?)
        }
        VolumeCommand::Create { id, size: Some(size), pool, .. } => {
            let (agent, id) = to_volume(global, id).await?;
            let pool = pool.clone();
            let ask = CreateVolumeRequest { id, size_bytes: *size, pool, source: None };
            let volume = agent.ask(agent.volumes().create(ask)).await?;
            print_volume(global, &volume, |volume| format!("{}\n", volume.id))
        }
        VolumeCommand::Create { id, size: None, from_snapshot, from_volume, from, pool } => {
            let (snapshot_id, volume_id) = (from_snapshot.clone(), from_volume.clone());
            let source = Origin { snapshot_id, volume_id };
            let volume = copying::run(global, id, source, from.as_ref(), pool).await?;
            print_volume(global, &volume, |volume| format!("{}\n", volume.id))
        }
        VolumeCommand::Revert { which: Which { id, generation, incarnation }, snapshot } => {
            check_id(snapshot)?;
            let (agent, id) = to_volume(global, id).await?;
            let (generation, incarnation) = (*generation, incarnation.clone());
            let snapshot_id = snapshot.clone();
            let ask = RevertVolumeRequest { id, snapshot_id, generation, incarnation };
            let volume = agent.ask(agent.volumes().revert(ask)).await?;
            print_volume(global, &volume, row)
        }
        VolumeCommand::Reclaim { id, from } => {
            let (agent, id) = to_volume(global, id).await?;
            let get = GetVolumeRequest { id: id.clone() };
            let lent = agent.ask(agent.volumes().get(get.clone())).await?;
            let Some(peer) = lent.peer_node.as_ref() else {
                // It has come back, if it was ever away.
                return print_volume(global, &lent, row);
            };
            if peer != from {
                let text = format!("not {from} uses it, but {peer}");
                return Err(Failure::new(reason::GRANT_UNKNOWN, text).with("id", id));
            }
            let ask = ReclaimRequest {
                volume_id: id,
                grant_id: lent.grant_id.unwrap_or_default(),
                incarnation: lent.incarnation,
                generation: lent.generation,
            };
            agent.ask(agent.moves().reclaim(ask)).await?;
            let volume = agent.ask(agent.volumes().get(get)).await?;
            print_volume(global, &volume, row)
        }
        VolumeCommand::Show { id } => {
            let (agent, id) = to_volume(global, id).await?;
            let volume = agent.ask(agent.volumes().get(GetVolumeRequest { id })).await?;
            print_volume(global, &volume, output::volume)
        }
        VolumeCommand::Delete(Which { id, generation, incarnation }) => {
            let (agent, id) = to_volume(global, id).await?;
            let (generation, incarnation) = (*generation, incarnation.clone());
            let ask = DeleteVolumeRequest { id, generation, incarnation };
            agent.ask(agent.volumes().delete(ask)).await?;
            print_done(global)
        }
        VolumeCommand::Extend { which: Which { id, generation, incarnation }, size } => {
            let (agent, id) = to_volume(global, id).await?;
            let (generation, incarnation) = (*generation, incarnation.clone());
            let ask = ExtendVolumeRequest { id, size_bytes: *size, generation, incarnation };
            let volume = agent.ask(agent.volumes().extend(ask)).await?;
            print_volume(global, &volume, row)
        }
        VolumeCommand::Attach { id, generation } => {
            let (agent, id) = to_volume(global, id).await?;
            let ask = AttachVolumeRequest { id, generation: *generation };
            let volume = agent.ask(agent.volumes().attach(ask)).await?;
            print_volume(global, &volume, moving::device_line)
        }
        VolumeCommand::Detach(Which { id, generation, incarnation }) => {
            let (agent, id) = to_volume(global, id).await?;
            let (generation, incarnation) = (*generation, incarnation.clone());
            let ask = DetachVolumeRequest { id, generation, incarnation };
            let volume = agent.ask(agent.volumes().detach(ask)).await?;
            print_volume(global, &volume, silent)
        }
        VolumeCommand::Move { id, from, to, hold, wait, remote, local, pool } => {
            let mode = match (remote, local) {
                (true, _) => ReceiveMode::Remote,
                (false, true) => ReceiveMode::Local,
                (false, false) => ReceiveMode::Unspecified,
            };
            let (hold, wait, source) = (*hold, *wait, None);
            let order = moving::Move { id, from, to, hold, wait, pool, mode, source };
            moving::run(global, order).await
        }
        VolumeCommand::Localize { which: Which { id, generation, incarnation }, pool } => {
            let (agent, id) = to_volume(global, id).await?;
            let (generation, incarnation) = (*generation, incarnation.clone());
            let ask = LocalizeRequest { id, pool: pool.clone(), generation, incarnation };
            let volume = agent.ask(agent.moves().localize(ask)).await?;
            print_volume(global, &volume, row)
        }
        VolumeCommand::Switch { which: Which { id, generation, incarnation }, force } => {
            let (agent, id) = to_volume(global, id).await?;
            let (generation, incarnation) = (*generation, incarnation.clone());
            let ask = SwitchRequest { id, generation, incarnation, force: *force };
            let volume = agent.ask(agent.moves().switch(ask)).await?;
            print_volume(global, &volume, row)
        }
        VolumeCommand::Abort(Which { id, generation, incarnation }) => {
            let (agent, id) = to_volume(global, id).await?;
            let (generation, incarnation) = (*generation, incarnation.clone());
            let ask = AbortRequest { id, generation, incarnation };
            agent.ask(agent.moves().abort(ask)).await?;
            print_done(global)
        }
        VolumeCommand::ForgetSource { which, i_accept_data_loss } => {
            let Which { id, generation, incarnation } = which;
            let (agent, id) = to_volume(global, id).await?;
            let ask = ForgetSourceRequest {
                id,
                accept_data_loss: *i_accept_data_loss,
                generation: *generation,
                incarnation: incarnation.clone(),
            };
            let forgotten = agent.ask(agent.moves().forget_source(ask)).await?;
            match global.output {
                Output::Json => output::print_json(&forgotten)?,
                Output::Table => output::print(&output::forgotten(&forgotten))?,
            };
            Ok(())
        }
    }
}

/// Checks the id before anything else, then connects.
async fn to_volume(global: &Global, id: &str) -> Result<(Agent, String), Failure> {
    check_id(id)?;
    Ok((connect(global).await?, id.to_owned()))
}

async fn hydration(global: &Global, command: &HydrationCommand) -> Result<(), Failure> {
    let volume = match command {
        HydrationCommand::Pause { id } => {
            let (agent, id) = to_volume(global, id).await?;
            agent.ask(agent.moves().pause_hydration(PauseHydrationRequest { id })).await?
        }
        HydrationCommand::Resume { id } => {
            let (agent, id) = to_volume(global, id).await?;
            agent.ask(agent.moves().resume_hydration(ResumeHydrationRequest { id })).await?
        }
        HydrationCommand::Set { id, rate, threshold, batch, priority } => {
            let (agent, id) = to_volume(global, id).await?;
            let ask = TuneHydrationRequest {
                id,
                rate_bytes_per_s: *rate,
                threshold: *threshold,
                batch: *batch,
                priority: *priority,
            };
            agent.ask(agent.moves().tune_hydration(ask)).await?
        }
    };
    print_volume(global, &volume, |volume| output::volumes(std::slice::from_ref(volume)))
}

fn certificates(global: &Global, command: &PkiCommand) -> Result<(), Failure> {
    let written = match command {
        PkiCommand::Init { out, name } => pki::init(out, name)?,
        PkiCommand::Issue { ca_dir, role, node, addresses, dns, days, out } => {
            let subject = pki::Subject {
                role: *role,
                node: node.clone(),
                addresses: addresses.clone(),
                dns: dns.clone(),
                days: *days,
            };
            pki::issue(ca_dir, out, &subject)?
        }
    };
    match global.output {
        Output::Json => output::print_json(&written)?,
        Output::Table => output::print(&format!(
            "certificate {}\nkey {}\n",
            written.certificate.display(),
            written.key.display()
        ))?,
    };
    Ok(())
}

fn completions(shell: clap_complete::Shell) -> Result<(), Failure> {
    let mut script = Vec::new();
    clap_complete::generate(shell, &mut Cli::command(), "dmlocalctl", &mut script);
    output::print(&String::from_utf8_lossy(&script))?;
    Ok(())
}

fn man(dir: &Path) -> Result<(), Failure> {
    fs::create_dir_all(dir).and_then(|()| clap_mangen::generate_to(Cli::command(), dir)).map_err(
        |error| Failure::new(reason::OUTPUT_FAILED, format!("writing {}: {error}", dir.display())),
    )
}
