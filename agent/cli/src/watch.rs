//! `status --watch`: a table that redraws itself on a terminal, a line per
//! change anywhere else.

use std::{
    collections::{BTreeMap, BTreeSet},
    io::{self, IsTerminal as _},
    time::Duration,
};

use dmlocal_proto::v1::{GetVolumeRequest, Volume, WatchRequest, WatchResponse};
use rustix::{
    event::{PollFd, PollFlags, Timespec, poll},
    termios::tcgetwinsize,
};
use serde::Serialize;
use tokio::time::{MissedTickBehavior, interval};

use crate::{
    args::Output,
    client::Agent,
    error::{Failure, reason},
    output,
};

/// How often the table is drawn at most.
const REDRAW_INTERVAL: Duration = Duration::from_millis(250);

/// One change as JSON.
#[derive(Serialize)]
struct Change<'a> {
    #[serde(flatten)]
    volume: &'a Volume,
    /// True when the volume has left the node.
    gone: bool,
}

/// Shows changes until the reader goes away, Ctrl-C, or the one volume that is
/// watched has left the node.
pub(crate) async fn run(agent: &Agent, id: Option<&str>, format: Output) -> Result<(), Failure> {
    if let Some(id) = id {
        // Unknown ids are refused here; a watch alone might wait for them.
        agent.ask(agent.volumes().get(GetVolumeRequest { id: id.to_owned() })).await?;
    }
    let ask = WatchRequest { id: id.unwrap_or_default().to_owned() };
    let mut changes = agent.ask(agent.nodes().watch(ask)).await?;
    let mut screen = (format == Output::Table && io::stdout().is_terminal()).then(Screen::default);
    let mut tick = interval(REDRAW_INTERVAL);
    tick.set_missed_tick_behavior(MissedTickBehavior::Delay);
    let interrupt = tokio::signal::ctrl_c();
    tokio::pin!(interrupt);
    // A volume that returns to a node has two copies there for a while.
    let mut copies = BTreeSet::new();
    loop {
        let change = tokio::select! {
            change = changes.message() => change.map_err(|status| agent.explain(&status).failure)?,
            _ = tick.tick() => {
                if is_abandoned() {
                    return Ok(());
                }
                if let Some(screen) = &mut screen {
                    screen.draw()?;
                }
                continue;
            }
            _ = &mut interrupt => return Ok(()),
        };
        let Some(change) = change else {
            return Err(Failure::new(reason::CONNECTION_LOST, "the agent has ended the watch"));
        };
        let WatchResponse { volume: Some(volume), gone } = change else { continue };
        if gone {
            copies.remove(&volume.generation);
        } else {
            copies.insert(volume.generation);
        }
        let is_over = gone && id.is_some() && copies.is_empty();
        let read = match (&mut screen, format) {
            (Some(screen), _) => {
                screen.take(volume, gone);
                if is_over {
                    screen.draw()?;
                }
                true
            }
            (None, Output::Table) => output::print(&output::change(&volume, gone))?,
            (None, Output::Json) => output::print_json_line(&Change { volume: &volume, gone })?,
        };
        if !read || is_over {
            return Ok(());
        }
    }
}

/// Whether standard output is a pipe that nobody reads any more. Without asking,
/// a watch on a quiet node would notice only at the next change.
fn is_abandoned() -> bool {
    let out = io::stdout();
    let mut fds = [PollFd::new(&out, PollFlags::empty())];
    let at_once = Timespec::default();
    poll(&mut fds, Some(&at_once)).is_ok_and(|n| n > 0)
        && fds[0].revents().intersects(PollFlags::ERR | PollFlags::HUP | PollFlags::NVAL)
}

/// The table on a terminal.
#[derive(Default)]
struct Screen {
    volumes: BTreeMap<(String, u64), Volume>,
    changed: bool,
    /// Lines that the last drawing took.
    lines: usize,
}

impl Screen {
    fn take(&mut self, volume: Volume, gone: bool) {
        if gone {
            self.volumes.remove(&(volume.id, volume.generation));
        } else {
            self.volumes.insert((volume.id.clone(), volume.generation), volume);
        }
        self.changed = true;
    }

    /// Draws over the last drawing, if anything has changed.
    fn draw(&mut self) -> Result<(), Failure> {
        if !self.changed {
            return Ok(());
        }
        let (columns, rows) = tcgetwinsize(io::stdout())
            .map_or((80, 24), |size| (usize::from(size.ws_col), usize::from(size.ws_row)));
        let shown = fit(&output::bars(self.volumes.values()), columns, rows);
        let up = if self.lines > 0 { format!("\x1b[{}A", self.lines) } else { String::new() };
        output::print(&format!("{up}\r\x1b[J{shown}"))?;
        self.lines = shown.lines().count();
        self.changed = false;
        Ok(())
    }
}

/// Cuts a text to a terminal, so that going up by its lines comes back to its
/// beginning. The last row stays free for the cursor.
fn fit(text: &str, columns: usize, rows: usize) -> String {
    let room = rows.saturating_sub(1).max(1);
    let count = text.lines().count();
    let mut lines: Vec<String> =
        text.lines().take(room).map(|line| line.chars().take(columns).collect()).collect();
    if count > room
        && let Some(last) = lines.last_mut()
    {
        *last = format!("… and {} more", count - room + 1).chars().take(columns).collect();
    }
    lines.iter().map(|line| format!("{line}\n")).collect()
}

#[cfg(test)]
mod test {
    use dmlocal_proto::v1::Volume;

    use super::{Change, fit};

    #[test]
    fn a_table_is_cut_to_the_terminal() {
        assert_eq!(fit("abc\ndef\n", 80, 24), "abc\ndef\n");
        assert_eq!(fit("abc\ndef\n", 2, 24), "ab\nde\n");
        assert_eq!(fit("a\nb\nc\nd\n", 80, 4), "a\nb\n… and 2 more\n");
        assert_eq!(fit("a\nb\n", 80, 0), "… and 2 more\n");
    }

    #[test]
    fn a_change_is_the_volume_with_one_key_more() {
        let volume = Volume { id: "x".into(), ..Volume::default() };
        let value = serde_json::to_value(Change { volume: &volume, gone: true }).unwrap();
        assert_eq!(value["id"], "x");
        assert_eq!(value["gone"], true);
        assert_eq!(value["percent"], serde_json::Value::Null);
    }
}
