//! Why a copy is as it is, in words for people.

use dmlocal_model::{
    plan::Wait,
    volume::{ReceivingStage, Record},
};

use crate::{
    progress::{Pause, Progress},
    reconcile::Rest,
    when::rfc3339,
};

/// Why a copy rests where it does; empty when there is nothing to say.
pub fn describe(
    record: &Record,
    rest: Rest,
    progress: &Progress,
    inactive: Option<&str>,
) -> String {
    if let (Rest::Wait(Wait::Pool), Some(why)) = (rest, inactive) {
        return format!("{}: {why}", at_rest(rest));
    }
    let Some(receiving) = record.receiving() else { return at_rest(rest) };
    if let Some(failure) = &receiving.failure {
        return failure.why.clone();
    }
    if receiving.rebuild.is_some() {
        return "the source has grown: this copy follows".to_owned();
    }
    if receiving.stage == ReceivingStage::Refused {
        return "the source has withdrawn its grant: only an abort is left".to_owned();
    }
    let node = &receiving.source.node;
    match (rest, progress.stalled_since()) {
        (Rest::Wait(Wait::Source), Some(since)) => format!(
            "stalled: source {node} unreachable since {}, {} bytes still there",
            rfc3339(since),
            progress.bytes_left()
        ),
        (Rest::Wait(Wait::Source), None) => format!("source {node} does not answer"),
        (Rest::Wait(Wait::Lost), _) => format!(
            "source {node} was given up: reads of what is missing fail until it is rewritten"
        ),
        (Rest::Wait(Wait::Map), _) => format!("source {node} is asked what was never written"),
        (Rest::Wait(Wait::Remote), _) => format!("what is written here goes to {node}"),
        (Rest::Wait(Wait::Hydration), _) if record.tuning.paused => "paused".to_owned(),
        (Rest::Wait(Wait::Hydration), _) => progress.pause().map_or_else(String::new, paused),
        (rest, _) => at_rest(rest),
    }
}

fn at_rest(rest: Rest) -> String {
    match rest {
        Rest::Wait(Wait::Pool) => "the pool's logical volumes are not active".to_owned(),
        Rest::Wait(Wait::Request) => "waits for the volume it is taken of".to_owned(),
        Rest::Wait(Wait::Readers) => "goes as soon as nothing reads it any more".to_owned(),
        Rest::Wait(Wait::Operator) => "a device is not as the journal says".to_owned(),
        Rest::Settled
        | Rest::Gone
        | Rest::Wait(
            Wait::Switch
            | Wait::Map
            | Wait::Hydration
            | Wait::Remote
            | Wait::Source
            | Wait::Lost
            | Wait::Peer,
        ) => String::new(),
    }
}

fn paused(pause: Pause) -> String {
    match pause {
        Pause::Pool => "copying rests: the pool is nearly full".to_owned(),
        Pause::Rate => "copying rests: its byte rate is used up".to_owned(),
        Pause::NodeRate => "copying rests: the node's byte rate is used up".to_owned(),
        Pause::Turn { before: 1 } => "copying waits: 1 other is before it".to_owned(),
        Pause::Turn { before } => format!("copying waits: {before} others are before it"),
    }
}
