//! Sizes: how they are written on the command line and how tables show them.

/// Binary units, smallest first.
const UNITS: [(&str, u32); 4] = [("KiB", 10), ("MiB", 20), ("GiB", 30), ("TiB", 40)];

/// Why a word is not a size.
#[derive(Clone, Copy, Debug, Eq, PartialEq, thiserror::Error)]
pub(crate) enum SizeError {
    /// Not digits with an optional unit.
    #[error("not a size: write bytes as digits, or digits and one of KiB, MiB, GiB, TiB")]
    Malformed,
    /// More bytes than a 64-bit number holds.
    #[error("more than 18446744073709551615 bytes")]
    TooLarge,
}

/// Parses `64MiB`, `1GiB`, `512KiB`, `1TiB` or plain bytes. Whole numbers only;
/// no sign, no space, no other spelling of a unit.
pub(crate) fn parse(text: &str) -> Result<u64, SizeError> {
    let (digits, shift) = UNITS
        .iter()
        .find_map(|(unit, shift)| text.strip_suffix(unit).map(|digits| (digits, *shift)))
        .unwrap_or((text, 0));
    if digits.is_empty() || !digits.bytes().all(|b| b.is_ascii_digit()) {
        return Err(SizeError::Malformed);
    }
    let number: u64 = digits.parse().map_err(|_| SizeError::TooLarge)?;
    number.checked_mul(1 << shift).ok_or(SizeError::TooLarge)
}

/// Shows a size in the largest unit of which there is at least one: exact when
/// the unit divides it, with one decimal place otherwise.
pub(crate) fn show(bytes: u64) -> String {
    let Some((unit, shift)) = UNITS.iter().rev().find(|(_, shift)| bytes >> shift > 0) else {
        return bytes.to_string();
    };
    let whole = bytes >> shift;
    // Tenths are cut off, never rounded up: what is shown as left is there.
    let rest = u128::from(bytes - (whole << shift));
    if rest == 0 {
        format!("{whole}{unit}")
    } else {
        format!("{whole}.{}{unit}", (rest * 10) >> shift)
    }
}

#[cfg(test)]
mod test {
    use proptest::prelude::*;

    use super::{SizeError, parse, show};

    #[test]
    fn sizes_are_bytes_or_whole_binary_units() {
        let table = [
            ("0", 0),
            ("1", 1),
            ("007", 7),
            ("512KiB", 512 << 10),
            ("64MiB", 64 << 20),
            ("1GiB", 1 << 30),
            ("1TiB", 1 << 40),
            ("18446744073709551615", u64::MAX),
            ("16777215TiB", 16_777_215 << 40),
        ];
        for (text, bytes) in table {
            assert_eq!(parse(text), Ok(bytes), "{text}");
        }
    }

    #[test]
    fn anything_else_is_malformed() {
        let table = [
            "", "KiB", "1.5GiB", "1 GiB", " 1GiB", "1GiB ", "-1", "+1", "1gib", "1GB", "1G", "1B",
            "0x10", "1e3", "1_000", "GiB1", "1KiBMiB", "١", "inf",
        ];
        for text in table {
            assert_eq!(parse(text), Err(SizeError::Malformed), "{text}");
        }
    }

    #[test]
    fn more_than_64_bits_is_refused() {
        for text in ["18446744073709551616", "16777216TiB", "99999999999999999999999KiB"] {
            assert_eq!(parse(text), Err(SizeError::TooLarge), "{text}");
        }
    }

    #[test]
    fn sizes_are_shown_exactly_or_cut_to_a_tenth() {
        let table = [
            (0, "0"),
            (1023, "1023"),
            (1024, "1KiB"),
            (1536, "1.5KiB"),
            ((1 << 30) - 1, "1023.9MiB"),
            (1 << 30, "1GiB"),
            ((1 << 30) + 1, "1.0GiB"),
            (u64::MAX, "16777215.9TiB"),
        ];
        for (bytes, text) in table {
            assert_eq!(show(bytes), text);
        }
    }

    proptest! {
        #[test]
        fn plain_bytes_mean_themselves(bytes: u64) {
            prop_assert_eq!(parse(&bytes.to_string()), Ok(bytes));
        }

        #[test]
        fn a_unit_multiplies(number in 0u64..1 << 24, unit in 0usize..4) {
            let (word, shift) = super::UNITS[unit];
            prop_assert_eq!(parse(&format!("{number}{word}")), Ok(number << shift));
        }

        #[test]
        fn no_word_makes_it_panic(text in "\\PC*") {
            let _ = parse(&text);
        }
    }
}
