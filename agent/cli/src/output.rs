//! Printing: tables for people, JSON for programs.

use std::io::{self, Write as _};

use dmlocal_proto::{
    snapshot_state_word, state_word,
    v1::{ForgetSourceResponse, Node, Origin, Pool, Snapshot, Volume},
};
use serde::Serialize;

use crate::{
    args::Output,
    error::{Failure, reason},
    size,
};

/// What stands in a cell about which nothing is known.
const UNKNOWN: &str = "-";
/// Cells of a progress bar.
const BAR_WIDTH: u32 = 20;

/// Reports a failure on standard error.
pub(crate) fn failure(output: Output, failure: &Failure) {
    let text = match output {
        Output::Table => format!("error: {failure}"),
        Output::Json => failure_json(failure),
    };
    // Nothing is left to report to if this fails.
    let _ = writeln!(io::stderr(), "{text}");
}

fn failure_json(failure: &Failure) -> String {
    // A failure holds only strings: it always serialises.
    serde_json::to_string(failure).unwrap_or_default()
}

/// Writes to standard output at once. False: nobody reads it any more, which is
/// no failure.
pub(crate) fn print(text: &str) -> Result<bool, Failure> {
    let mut out = io::stdout().lock();
    match out.write_all(text.as_bytes()).and_then(|()| out.flush()) {
        Ok(()) => Ok(true),
        Err(error) if error.kind() == io::ErrorKind::BrokenPipe => Ok(false),
        Err(error) => {
            Err(Failure::new(reason::OUTPUT_FAILED, format!("writing standard output: {error}")))
        }
    }
}

/// Writes a value to standard output as indented JSON.
pub(crate) fn print_json<T: Serialize + ?Sized>(value: &T) -> Result<bool, Failure> {
    print(&json(serde_json::to_string_pretty(value))?)
}

/// Writes a value to standard output as JSON on one line.
pub(crate) fn print_json_line<T: Serialize + ?Sized>(value: &T) -> Result<bool, Failure> {
    print(&json(serde_json::to_string(value))?)
}

fn json(text: serde_json::Result<String>) -> Result<String, Failure> {
    text.map(|text| text + "\n")
        .map_err(|error| Failure::new(reason::INTERNAL, format!("making JSON: {error}")))
}

/// Aligned columns, two spaces apart; the last one is not padded.
pub(crate) fn table<const N: usize>(head: [&str; N], rows: &[[String; N]]) -> String {
    let mut widths = head.map(|cell| cell.chars().count());
    for row in rows {
        for (width, cell) in widths.iter_mut().zip(row) {
            *width = (*width).max(cell.chars().count());
        }
    }
    let mut text = line(&head, &widths);
    for row in rows {
        text += &line(&row.each_ref().map(String::as_str), &widths);
    }
    text
}

/// One line of a table with the given widths.
fn line(cells: &[&str], widths: &[usize]) -> String {
    let mut text = String::new();
    for (cell, width) in cells.iter().zip(widths) {
        text += &format!("{cell:width$}  ");
    }
    text.truncate(text.trim_end().len());
    text.push('\n');
    text
}

/// Names and values, one pair a line.
fn pairs(pairs: &[(&str, String)]) -> String {
    let width = pairs.iter().map(|(name, _)| name.len()).max().unwrap_or_default();
    pairs.iter().map(|(name, value)| line(&[name, value], &[width, 0])).collect()
}

/// The columns of `status`.
const STATUS_HEAD: [&str; 12] = [
    "ID",
    "SIZE",
    "ALLOCATED",
    "STATE",
    "ATTACHED",
    "PERCENT",
    "LEFT",
    "RATE",
    "ETA",
    "SOURCE",
    "GEN",
    "DETAIL",
];

/// Widths for lines that are printed one after the other.
const STATUS_WIDTHS: [usize; 12] = [36, 9, 9, 10, 8, 7, 9, 11, 6, 8, 3, 0];

/// The table of `status` and `volume list`.
pub(crate) fn volumes(volumes: &[Volume]) -> String {
    let rows: Vec<_> = volumes.iter().map(|volume| cells(volume, &state(volume))).collect();
    table(STATUS_HEAD, &rows)
}

/// The line of `status --watch` for one change.
pub(crate) fn change(volume: &Volume, gone: bool) -> String {
    let state = if gone { "gone".to_owned() } else { state(volume) };
    line(&cells(volume, &state).each_ref().map(String::as_str), &STATUS_WIDTHS)
}

/// The table with bars that `status --watch` redraws on a terminal.
pub(crate) fn bars<'a>(volumes: impl Iterator<Item = &'a Volume>) -> String {
    let rows: Vec<_> = volumes
        .map(|volume| {
            let [id, size, _, state, _, _, left, rate, eta, source, _, detail] =
                cells(volume, &state(volume));
            let progress = volume.percent.map_or_else(|| UNKNOWN.to_owned(), bar);
            [id, size, state, progress, left, rate, eta, source, detail]
        })
        .collect();
    table(["ID", "SIZE", "STATE", "PROGRESS", "LEFT", "RATE", "ETA", "SOURCE", "DETAIL"], &rows)
}

/// How far a copy is, in one short line.
pub(crate) fn progress(volume: &Volume) -> String {
    let [_, _, _, state, _, _, left, rate, eta, ..] = cells(volume, &state(volume));
    let bar = volume.percent.map_or_else(String::new, |percent| bar(percent) + "  ");
    format!("{bar}{state}  {left} left  {rate}  {eta}")
}

/// A bar and its number. Neither says 100 before everything is there.
fn bar(percent: f64) -> String {
    let percent = percent.clamp(0.0, 100.0);
    let full = (percent / 100.0 * f64::from(BAR_WIDTH)).floor();
    let cells: String =
        (0..BAR_WIDTH).map(|cell| if f64::from(cell) < full { '#' } else { '-' }).collect();
    format!("[{cells}] {:>6}", share(percent))
}

/// A percentage, cut to a tenth.
fn share(percent: f64) -> String {
    format!("{:.1}%", (percent * 10.0).floor() / 10.0)
}

fn cells(volume: &Volume, state: &str) -> [String; 12] {
    [
        plain(&volume.id),
        size::show(volume.size_bytes),
        known(volume.allocated_bytes.map(size::show)),
        state.to_owned(),
        yes(volume.attached),
        known(volume.percent.map(share)),
        known(volume.bytes_left.map(size::show)),
        known(volume.rate_bytes_per_s.map(rate)),
        known(volume.eta_s.map(duration)),
        known(volume.source_node.as_deref().map(plain)),
        volume.generation.to_string(),
        plain(&volume.detail),
    ]
}

/// Everything about one volume.
pub(crate) fn volume(volume: &Volume) -> String {
    let hydration = volume.hydration.as_ref();
    let text = |text: &Option<String>| known(text.as_deref().map(plain));
    let setting = |value: Option<u32>| known(value.map(|value| value.to_string()));
    pairs(&[
        ("id", plain(&volume.id)),
        ("size", format!("{} ({} bytes)", size::show(volume.size_bytes), volume.size_bytes)),
        ("allocated", known(volume.allocated_bytes.map(size::show))),
        ("state", state(volume)),
        ("detail", plain(&volume.detail)),
        ("attached", yes(volume.attached)),
        ("device", text(&volume.device_path)),
        ("pool", plain(&volume.pool)),
        ("logical block", size::show(volume.logical_block_size.into())),
        ("generation", volume.generation.to_string()),
        ("incarnation", plain(&volume.incarnation)),
        ("source node", text(&volume.source_node)),
        ("peer node", text(&volume.peer_node)),
        ("made of", known(volume.source.as_ref().and_then(made_of))),
        ("grant", text(&volume.grant_id)),
        ("percent", known(volume.percent.map(share))),
        ("left", known(volume.bytes_left.map(size::show))),
        ("lost", known(volume.bytes_lost.map(size::show))),
        ("rate", known(volume.rate_bytes_per_s.map(rate))),
        ("eta", known(volume.eta_s.map(duration))),
        ("region", known(volume.region_bytes.map(size::show))),
        ("held writes", known(volume.held_writes.map(|writes| writes.to_string()))),
        ("stalled since", known(volume.stalled_since_s.map(|s| format!("{s} s after 1970")))),
        ("hydration paused", known(hydration.map(|h| yes(h.paused)))),
        ("hydration rate", known(hydration.map(|h| limit(h.rate_bytes_per_s)))),
        ("hydration threshold", setting(hydration.map(|h| h.threshold))),
        ("hydration batch", setting(hydration.map(|h| h.batch))),
        ("hydration priority", known(hydration.map(|h| h.priority.to_string()))),
    ])
}

/// What was lost with a source that was given up.
pub(crate) fn forgotten(forgotten: &ForgetSourceResponse) -> String {
    match forgotten.regions_lost {
        0 => "nothing is lost\n".to_owned(),
        regions => {
            let bytes = forgotten.bytes_lost;
            format!("lost: {} ({bytes} bytes) in {regions} regions\n", size::show(bytes))
        }
    }
}

fn made_of(source: &Origin) -> Option<String> {
    let snapshot = source.snapshot_id.as_ref().map(|id| format!("snapshot {}", plain(id)));
    snapshot.or_else(|| source.volume_id.as_ref().map(|id| format!("volume {}", plain(id))))
}

/// The table of `snapshot list`.
pub(crate) fn snapshots(snapshots: &[Snapshot]) -> String {
    let rows: Vec<_> = snapshots
        .iter()
        .map(|snapshot| {
            [
                plain(&snapshot.id),
                plain(&snapshot.volume_id),
                size::show(snapshot.size_bytes),
                snapshot_state_word(snapshot.state),
                plain(&snapshot.pool),
                snapshot.read_by.len().to_string(),
                plain(&snapshot.detail),
            ]
        })
        .collect();
    table(["ID", "VOLUME", "SIZE", "STATE", "POOL", "READERS", "DETAIL"], &rows)
}

/// The table of `pool list`.
pub(crate) fn pools(pools: &[Pool]) -> String {
    let rows: Vec<_> = pools
        .iter()
        .map(|pool| {
            [
                plain(&pool.name),
                plain(&pool.volume_group),
                plain(&pool.thin_pool),
                size::show(pool.size_bytes),
                size::show(pool.used_bytes),
                size::show(pool.provisioned_bytes),
                size::show(pool.free_bytes),
                size::show(pool.chunk_size_bytes),
                size::show(pool.logical_block_size.into()),
                yes(pool.present),
            ]
        })
        .collect();
    let head = [
        "POOL",
        "VG",
        "THIN POOL",
        "SIZE",
        "USED",
        "PROVISIONED",
        "FREE",
        "CHUNK",
        "BLOCK",
        "PRESENT",
    ];
    table(head, &rows)
}

/// Everything about a node.
pub(crate) fn node(node: &Node) -> String {
    let list =
        |items: &[String]| items.iter().map(|item| plain(item)).collect::<Vec<_>>().join(", ");
    let mut text = pairs(&[
        ("name", plain(&node.name)),
        ("version", plain(&node.version)),
        ("api version", format!("{} (oldest {})", node.api_version, node.oldest_api_version)),
        ("journal version", node.journal_version.to_string()),
        ("kernel", plain(&node.kernel)),
        ("targets", list(&node.targets)),
        ("pools", list(&node.pools)),
        ("endpoint", plain(&node.endpoint)),
        ("host nqn", plain(&node.host_nqn)),
    ]);
    for warning in &node.warnings {
        text += &format!("warning: {}\n", plain(warning));
    }
    text
}

fn state(volume: &Volume) -> String {
    state_word(volume.state)
}

fn yes(answer: bool) -> String {
    if answer { "yes" } else { "no" }.to_owned()
}

fn known(value: Option<String>) -> String {
    value.unwrap_or_else(|| UNKNOWN.to_owned())
}

fn rate(bytes_per_s: u64) -> String {
    format!("{}/s", size::show(bytes_per_s))
}

fn limit(bytes_per_s: u64) -> String {
    if bytes_per_s == 0 { "unlimited".to_owned() } else { rate(bytes_per_s) }
}

/// Seconds in at most two units.
fn duration(seconds: u64) -> String {
    let (minutes, hours, days) = (seconds / 60, seconds / 3600, seconds / 86_400);
    match () {
        () if days > 0 => format!("{days}d{}h", hours % 24),
        () if hours > 0 => format!("{hours}h{}m", minutes % 60),
        () if minutes > 0 => format!("{minutes}m{}s", seconds % 60),
        () => format!("{seconds}s"),
    }
}

/// Text of others, without anything that could steer a terminal or break a line.
fn plain(text: &str) -> String {
    let mut safe = String::with_capacity(text.len());
    for c in text.chars() {
        if c.is_control() { safe.extend(c.escape_default()) } else { safe.push(c) }
    }
    safe
}

#[cfg(test)]
mod test {
    use dmlocal_proto::v1::{Hydration, Volume, VolumeState};
    use serde_json::{Value, json};

    use super::{
        bar, bars, change, duration, failure_json, plain, progress, table, volume, volumes,
    };
    use crate::error::Failure;

    fn hydrating() -> Volume {
        Volume {
            id: "6e1f2a52-6c57-4a7b-9d3a-0f4dd1f0c001".into(),
            size_bytes: 1 << 30,
            allocated_bytes: Some(96 << 20),
            state: VolumeState::Hydrating.into(),
            attached: true,
            device_path: Some("/dev/mapper/dmlocal-6e1f".into()),
            percent: Some(42.19),
            bytes_left: Some(600 << 20),
            rate_bytes_per_s: Some(80 << 20),
            eta_s: Some(7),
            source_node: Some("node-a".into()),
            generation: 2,
            hydration: Some(Hydration {
                paused: false,
                rate_bytes_per_s: 0,
                threshold: 1,
                batch: 1,
                priority: 0,
            }),
            ..Volume::default()
        }
    }

    fn local() -> Volume {
        Volume {
            id: "0b8f5a9e-53cc-4b8b-8f0e-9b1f3c2d4e5f".into(),
            size_bytes: 64 << 20,
            state: VolumeState::Local.into(),
            generation: 1,
            detail: "nothing\nto see".into(),
            ..Volume::default()
        }
    }

    #[test]
    fn columns_are_aligned_and_the_last_is_not_padded() {
        let rows = [["db-1".into(), "hydrating 42%".into()], ["web".into(), "flat".into()]];
        let shown = table(["VOLUME", "STATE"], &rows);
        assert_eq!(shown, "VOLUME  STATE\ndb-1    hydrating 42%\nweb     flat\n");
    }

    #[test]
    fn status_shows_a_line_per_volume_and_dashes_for_what_is_unknown() {
        let expected = "\
ID                                    SIZE   ALLOCATED  STATE      ATTACHED  PERCENT  LEFT    RATE     ETA  SOURCE  GEN  DETAIL
6e1f2a52-6c57-4a7b-9d3a-0f4dd1f0c001  1GiB   96MiB      hydrating  yes       42.1%    600MiB  80MiB/s  7s   node-a  2
0b8f5a9e-53cc-4b8b-8f0e-9b1f3c2d4e5f  64MiB  -          local      no        -        -       -        -    -       1    nothing\\nto see
";
        assert_eq!(volumes(&[hydrating(), local()]), expected);
    }

    #[test]
    fn no_volumes_are_a_head_without_lines() {
        assert_eq!(volumes(&[]).lines().count(), 1);
    }

    #[test]
    fn a_change_is_one_line_and_says_when_the_volume_is_gone() {
        assert_eq!(change(&local(), false).lines().count(), 1);
        assert!(change(&local(), false).contains("  local  "));
        assert!(change(&local(), true).contains("  gone  "));
    }

    #[test]
    fn bars_are_never_full_before_the_end() {
        assert_eq!(bar(0.0), "[--------------------]   0.0%");
        assert_eq!(bar(50.0), "[##########----------]  50.0%");
        assert_eq!(bar(99.99), "[###################-]  99.9%");
        assert_eq!(bar(100.0), "[####################] 100.0%");
        assert!(bars([hydrating(), local()].iter()).contains("[########------------]  42.1%"));
        assert!(progress(&hydrating()).contains("hydrating  600MiB left"));
    }

    #[test]
    fn one_volume_shows_every_field() {
        let shown = volume(&hydrating());
        assert!(shown.contains("size                 1GiB (1073741824 bytes)\n"), "{shown}");
        assert!(shown.contains("hydration rate       unlimited\n"), "{shown}");
        assert!(shown.contains("held writes          -\n"), "{shown}");
    }

    #[test]
    fn durations_have_two_units_at_most() {
        let table = [(0, "0s"), (59, "59s"), (61, "1m1s"), (3_660, "1h1m"), (90_000, "1d1h")];
        for (seconds, text) in table {
            assert_eq!(duration(seconds), text);
        }
    }

    #[test]
    fn text_of_others_cannot_steer_a_terminal() {
        assert_eq!(plain("a\u{1b}[2Jb\r\u{9b}"), "a\\u{1b}[2Jb\\r\\u{9b}");
    }

    #[test]
    fn json_has_the_protos_names_with_numbers_words_and_nulls() {
        let value = serde_json::to_value(local()).unwrap();
        let expected = [
            ("id", json!("0b8f5a9e-53cc-4b8b-8f0e-9b1f3c2d4e5f")),
            ("size_bytes", json!(67_108_864)),
            ("state", json!("local")),
            ("attached", json!(false)),
            ("device_path", Value::Null),
            ("percent", Value::Null),
            ("bytes_left", Value::Null),
            ("rate_bytes_per_s", Value::Null),
            ("eta_s", Value::Null),
            ("source_node", Value::Null),
            ("generation", json!(1)),
        ];
        for (key, wanted) in expected {
            assert_eq!(value.get(key), Some(&wanted), "{key}");
        }
    }

    #[test]
    fn a_failure_is_an_object_of_reason_message_and_metadata() {
        let failure = Failure::new("NO_ROOM", "the pool is full").with("pool", "fast");
        let value: Value = serde_json::from_str(&failure_json(&failure)).unwrap();
        let wanted = json!({
            "reason": "NO_ROOM", "message": "the pool is full", "metadata": {"pool": "fast"}
        });
        assert_eq!(value, wanted);
        assert_eq!(failure.to_string(), "the pool is full (NO_ROOM)");
    }
}
