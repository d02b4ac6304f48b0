//! What volumes and their moves do on nodes with real kernels, told as sentences.
//!
//! `cargo xtask test` runs these, several at a time where there are processors for
//! it. They share nodes, because each scenario has to leave nothing behind; one that
//! fails takes its nodes with it. libtest has no place to take a shared cluster down,
//! so this program runs its scenarios by itself and understands as much of libtest's
//! command line as is used here.

#[path = "volumes/bed.rs"]
mod bed;
#[path = "volumes/chains.rs"]
mod chains;
#[path = "volumes/cinder.rs"]
mod cinder;
#[path = "volumes/cloud.rs"]
mod cloud;
#[path = "volumes/controller.rs"]
mod controller;
#[path = "volumes/faults.rs"]
mod faults;
#[path = "volumes/guest.rs"]
mod guest;
#[path = "volumes/lost.rs"]
mod lost;
#[path = "volumes/migrations.rs"]
mod migrations;
#[path = "volumes/moves.rs"]
mod moves;
#[path = "volumes/nova.rs"]
mod nova;
#[path = "volumes/refusals.rs"]
mod refusals;
#[path = "volumes/remote.rs"]
mod remote;
#[path = "volumes/snapshots.rs"]
mod snapshots;
#[path = "volumes/sparse.rs"]
mod sparse;
#[path = "volumes/stays.rs"]
mod stays;

use std::env;
use std::process::ExitCode;
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::thread;
use std::time::Instant;

use anyhow::{Context, Result};
use bed::Bed;

/// A scenario and its name, which is a sentence.
type Scenario = (&'static str, fn(&Bed) -> Result<()>);

macro_rules! scenarios {
    ($($module:ident::$name:ident),* $(,)?) => {
        &[$((stringify!($name), $module::$name as fn(&Bed) -> Result<()>)),*]
    };
}

/// In this order: what most depends on comes first.
const SCENARIOS: &[Scenario] = scenarios![
    stays::a_new_volume_on_used_space_reads_zeros,
    stays::an_open_descriptor_sees_an_extension,
    moves::a_volume_moves_while_it_is_written,
    moves::writes_overlap_with_copying,
    moves::the_first_write_at_the_destination_switches_over,
    moves::a_source_that_is_still_written_is_not_fenced,
    moves::a_detached_volume_moves_cold_and_an_attached_one_does_not,
    moves::an_aborted_move_leaves_the_source_writing,
    moves::a_write_that_waits_at_the_destination_forbids_an_abort,
    moves::discards_are_refused_until_everything_is_here,
    moves::what_a_page_cache_holds_at_the_source_arrives,
    moves::two_volumes_pass_each_other,
    moves::a_volume_does_not_return_below_an_open_old_handle,
    moves::a_volume_returns_before_it_has_arrived,
    moves::a_held_volume_grows_at_its_source,
    moves::a_volume_grows_while_it_is_copied,
    moves::a_volume_is_deleted_before_it_has_arrived,
    moves::no_host_looks_into_a_volume,
    snapshots::a_snapshot_is_of_one_moment_and_a_volume_goes_back_to_it,
    snapshots::a_volume_is_made_of_a_snapshot_on_another_node,
    snapshots::a_snapshot_of_a_hydrating_volume_is_of_its_moment,
    sparse::only_what_was_written_travels_below_a_running_writer,
    sparse::only_what_was_written_travels_cold_and_back,
    sparse::agents_killed_while_marking_what_was_never_written_go_on,
    sparse::what_is_made_of_a_sparse_snapshot_elsewhere_is_as_sparse,
    refusals::requests_that_make_no_sense_change_nothing,
    refusals::requests_during_a_move_change_nothing,
    refusals::certificates_of_other_roles_are_refused,
    refusals::a_pool_that_is_away_is_named,
    refusals::a_pool_of_other_blocks_takes_no_volume_from_elsewhere,
    refusals::a_kernel_without_dm_clone_is_named,
    remote::a_volume_is_written_elsewhere_and_comes_home,
    remote::a_remote_volume_is_localized_under_load,
    remote::a_remote_volume_moves_on_once_it_is_being_copied,
    remote::a_full_pool_makes_a_move_remote_and_room_makes_it_local,
    remote::a_remote_volume_outlives_the_power_of_its_user,
    remote::a_remote_volume_is_taken_back_from_a_lost_node,
    remote::a_remote_volume_stops_with_the_power_of_its_source,
    remote::a_remote_volume_waits_for_a_pulled_cable,
    faults::agents_killed_around_the_switch_go_on,
    faults::agents_killed_while_a_volume_arrives_go_on,
    faults::agents_killed_while_copying_go_on,
    faults::agents_killed_while_parting_go_on,
    faults::fio_verifies_while_agents_are_killed,
    faults::a_destination_that_lost_power_goes_on_copying,
    faults::a_destination_boots_while_its_source_is_away,
    faults::a_source_that_lost_power_is_waited_for,
    faults::a_source_behind_a_pulled_cable_is_waited_for,
    lost::a_source_that_is_lost_for_ever_is_given_up,
    lost::a_switch_whose_source_has_died_is_given_up,
    migrations::a_guest_migrates_while_it_writes,
    migrations::a_guest_whose_migration_is_cancelled_stays,
    migrations::a_guest_stays_whose_destination_loses_power,
    cinder::a_volume_follows_its_guest_through_cinder,
    cinder::a_guest_whose_destination_fails_migrates_later,
    cinder::an_evacuated_volume_waits_for_its_node,
    nova::a_guest_goes_wherever_nova_takes_it,
    nova::an_instance_is_evacuated_once_its_node_is_back,
    nova::a_used_volume_changes_while_its_guest_goes_on,
    nova::a_guest_stays_where_its_volumes_cannot_follow,
    nova::a_guest_returns_before_its_volume_has_arrived,
    chains::a_volume_passes_through_a_node_before_it_is_whole_there,
    controller::a_controller_copies_images_into_volumes_and_back,
    controller::a_controller_backs_a_volume_up_and_copies_it,
    // Leaves its nodes with larger pools.
    nova::a_hundred_volumes_come_and_go_at_once,
];

/// Those that need a third node. They come last: nodes are started anew for them.
const THREE: &[&str] = &[
    "a_volume_passes_through_a_node_before_it_is_whole_there",
    "a_controller_copies_images_into_volumes_and_back",
    "a_controller_backs_a_volume_up_and_copies_it",
];

/// How much of the scenarios runs: `DMLOCAL_SCENARIOS` says `long` or `full`, and a
/// scenario that is asked for by name always runs.
const EXTENT: &str = "DMLOCAL_SCENARIOS";

/// Those that a change has to pass, and that are too much for every try: `--long`.
const LONG: &[&str] = &[
    "a_volume_follows_its_guest_through_cinder",
    "a_guest_whose_destination_fails_migrates_later",
    "an_evacuated_volume_waits_for_its_node",
    "agents_killed_around_the_switch_go_on",
    "discards_are_refused_until_everything_is_here",
    "a_pool_of_other_blocks_takes_no_volume_from_elsewhere",
    "a_volume_is_written_elsewhere_and_comes_home",
    "writes_overlap_with_copying",
    "a_source_that_is_still_written_is_not_fenced",
    "a_detached_volume_moves_cold_and_an_attached_one_does_not",
    "what_a_page_cache_holds_at_the_source_arrives",
    "a_volume_does_not_return_below_an_open_old_handle",
    "a_volume_returns_before_it_has_arrived",
    "a_held_volume_grows_at_its_source",
    "a_volume_is_deleted_before_it_has_arrived",
    "no_host_looks_into_a_volume",
    "a_snapshot_is_of_one_moment_and_a_volume_goes_back_to_it",
    "a_volume_is_made_of_a_snapshot_on_another_node",
    "only_what_was_written_travels_below_a_running_writer",
    "agents_killed_while_marking_what_was_never_written_go_on",
    "a_kernel_without_dm_clone_is_named",
    "agents_killed_while_a_volume_arrives_go_on",
    "fio_verifies_while_agents_are_killed",
    "a_source_that_lost_power_is_waited_for",
    "a_source_that_is_lost_for_ever_is_given_up",
    "a_guest_migrates_while_it_writes",
    "a_guest_stays_whose_destination_loses_power",
];

/// Those that wait for the kernel's own timeouts or for a whole shutdown, and those whose
/// rules others hold to as well: `--full`.
const FULL: &[&str] = &[
    "a_snapshot_of_a_hydrating_volume_is_of_its_moment",
    "two_volumes_pass_each_other",
    "a_volume_grows_while_it_is_copied",
    "only_what_was_written_travels_cold_and_back",
    "what_is_made_of_a_sparse_snapshot_elsewhere_is_as_sparse",
    "agents_killed_while_copying_go_on",
    "agents_killed_while_parting_go_on",
    "a_destination_boots_while_its_source_is_away",
    "a_source_behind_a_pulled_cable_is_waited_for",
    "a_switch_whose_source_has_died_is_given_up",
    "a_remote_volume_waits_for_a_pulled_cable",
    "a_remote_volume_is_localized_under_load",
    "a_remote_volume_moves_on_once_it_is_being_copied",
    "a_full_pool_makes_a_move_remote_and_room_makes_it_local",
    "a_remote_volume_outlives_the_power_of_its_user",
    "a_remote_volume_is_taken_back_from_a_lost_node",
    "a_remote_volume_stops_with_the_power_of_its_source",
    "a_guest_whose_migration_is_cancelled_stays",
    "a_guest_stays_whose_destination_loses_power",
    "a_volume_passes_through_a_node_before_it_is_whole_there",
    "a_guest_goes_wherever_nova_takes_it",
    "an_instance_is_evacuated_once_its_node_is_back",
    "a_used_volume_changes_while_its_guest_goes_on",
    "a_guest_stays_where_its_volumes_cannot_follow",
    "a_guest_returns_before_its_volume_has_arrived",
    "a_hundred_volumes_come_and_go_at_once",
    "a_controller_copies_images_into_volumes_and_back",
    "a_controller_backs_a_volume_up_and_copies_it",
];

fn main() -> ExitCode {
    let mut wanted = false;
    let mut names = Vec::new();
    let mut arguments = env::args().skip(1);
    while let Some(argument) = arguments.next() {
        match argument.as_str() {
            "--list" => {
                SCENARIOS.iter().for_each(|(name, _)| println!("{name}: test"));
                return ExitCode::SUCCESS;
            }
            "--ignored" | "--include-ignored" => wanted = true,
            "--test-threads" => drop(arguments.next()),
            option if option.starts_with('-') => {}
            name => names.push(name.to_owned()),
        }
    }
    if !wanted {
        println!("ignored: the scenarios need virtual machines: cargo xtask test");
        return ExitCode::SUCCESS;
    }
    let extent = env::var(EXTENT).unwrap_or_default();
    let full = extent == "full" || !names.is_empty();
    let long = extent == "long" || full;
    let mut chosen = Vec::new();
    for scenario @ (name, _) in SCENARIOS {
        if !names.is_empty() && !names.iter().any(|part| name.contains(part)) {
            continue;
        }
        if FULL.contains(name) && !full {
            println!("scenario {name} ... left out: runs with --full");
        } else if LONG.contains(name) && !long {
            println!("scenario {name} ... left out: runs with --long");
        } else {
            chosen.push(scenario);
        }
    }
    let count = chosen.len();
    let queue = Mutex::new(chosen.into_iter());
    let failed = Mutex::new(Vec::new());
    // Two emulated nodes keep two processors busy: seen, two lanes on two processors
    // are no faster than one.
    let processors = thread::available_parallelism().map_or(1, usize::from);
    let lanes = (processors / 2).clamp(1, 4).min(count.max(1));
    thread::scope(|scope| {
        for _ in 0..lanes {
            scope.spawn(|| {
                let mut bed = None;
                while let Some((name, scenario)) = next(&queue) {
                    if !passes(&mut bed, name, scenario) {
                        locked(&failed).push(*name);
                    }
                }
            });
        }
    });
    let failed = locked(&failed);
    println!("\n{} of {count} scenarios passed", count - failed.len());
    if failed.is_empty() {
        return ExitCode::SUCCESS;
    }
    println!("failed: {}", failed.join(", "));
    ExitCode::FAILURE
}

fn locked<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

fn next<T>(queue: &Mutex<impl Iterator<Item = T>>) -> Option<T> {
    locked(queue).next()
}

/// Runs a scenario and tells how it went; nodes on which one failed are not used
/// again.
fn passes(bed: &mut Option<Bed>, name: &str, scenario: &fn(&Bed) -> Result<()>) -> bool {
    let started = Instant::now();
    let nodes = if THREE.contains(&name) { 3 } else { 2 };
    let mut outcome = run(bed, nodes, scenario);
    if outcome.is_err()
        && let Some(why) = bed.as_ref().and_then(Bed::emulator_failed)
    {
        println!("scenario {name} ... once more on new nodes: {why}");
        drop(bed.take());
        outcome = run(bed, nodes, scenario);
    }
    let took = started.elapsed().as_secs_f64();
    match outcome {
        Ok(()) => {
            println!("scenario {name} ... ok ({took:.1} s)");
            true
        }
        Err(error) => {
            println!("scenario {name} ... FAILED ({took:.1} s)\n{error:?}\n");
            if let Some(bed) = bed.take() {
                bed.keep_logs(name);
            }
            false
        }
    }
}

/// Runs a scenario on the nodes that there are, or on new ones.
fn run(bed: &mut Option<Bed>, nodes: usize, scenario: &fn(&Bed) -> Result<()>) -> Result<()> {
    if bed.as_ref().is_some_and(|bed| bed.nodes() != nodes) {
        drop(bed.take());
    }
    let bed = match bed {
        Some(bed) => bed,
        None => bed.insert(Bed::start(nodes).context("starting the nodes")?),
    };
    scenario(bed)?;
    bed.is_clean()
}
