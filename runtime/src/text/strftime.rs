//! The part of C's strftime that chat templates use (`strftime_now("%d %b %Y")`).
#![cfg_attr(
    not(test),
    deny(clippy::unwrap_used, clippy::expect_used, clippy::indexing_slicing)
)]

use std::time::{SystemTime, UNIX_EPOCH};

const DAYS: [&str; 7] = [
    "Thursday",
    "Friday",
    "Saturday",
    "Sunday",
    "Monday",
    "Tuesday",
    "Wednesday",
];
const MONTHS: [&str; 12] = [
    "January",
    "February",
    "March",
    "April",
    "May",
    "June",
    "July",
    "August",
    "September",
    "October",
    "November",
    "December",
];

/// Formats `time` in UTC. Known: `%Y %y %m %d %e %j %H %I %M %S %p %A %a %B %b %h %F %T %D %%`, each
/// number also without padding (`%-d`). Anything else is an error that names the directive.
pub(super) fn format_utc(format: &str, time: SystemTime) -> Result<String, String> {
    let seconds = time
        .duration_since(UNIX_EPOCH)
        .map_or(0, |since| since.as_secs());
    let (days, second_of_day) = (seconds / 86_400, seconds % 86_400);
    let (year, month, day, day_of_year) = civil_date(days);
    let (hour, minute, second) = (
        second_of_day / 3600,
        second_of_day / 60 % 60,
        second_of_day % 60,
    );
    // There are seven and twelve of them.
    let name = |names: &[&'static str], i: u64| names.get(i as usize).copied().unwrap_or_default();
    let weekday = name(&DAYS, days % 7);
    let month_name = name(&MONTHS, month - 1);
    let hour_12 = (hour + 11) % 12 + 1;
    let mut out = String::new();
    let mut rest = format.chars();
    while let Some(character) = rest.next() {
        if character != '%' {
            out.push(character);
            continue;
        }
        let mut directive = rest.next();
        let padded = directive != Some('-');
        if !padded {
            directive = rest.next();
        }
        let number = |value: u64, width: usize| {
            if padded {
                format!("{value:0width$}")
            } else {
                value.to_string()
            }
        };
        out += &match directive {
            Some('Y') => year.to_string(),
            Some('y') => number(year % 100, 2),
            Some('m') => number(month, 2),
            Some('d') => number(day, 2),
            Some('e') => format!("{day:2}"),
            Some('j') => number(day_of_year, 3),
            Some('H') => number(hour, 2),
            Some('I') => number(hour_12, 2),
            Some('M') => number(minute, 2),
            Some('S') => number(second, 2),
            Some('p') => if hour < 12 { "AM" } else { "PM" }.into(),
            Some('A') => weekday.into(),
            Some('a') => weekday[..3].into(),
            Some('B') => month_name.into(),
            Some('b' | 'h') => month_name[..3].into(),
            Some('F') => format!("{year}-{month:02}-{day:02}"),
            Some('T') => format!("{hour:02}:{minute:02}:{second:02}"),
            Some('D') => format!("{month:02}/{day:02}/{:02}", year % 100),
            Some('%') => "%".into(),
            Some(other) => {
                return Err(format!("strftime_now: directive %{other} is not supported"));
            }
            None => return Err("strftime_now: the format ends in %".into()),
        };
    }
    Ok(out)
}

/// (year, month 1..=12, day 1..=31, day of the year 1..=366) of a day counted from 1970-01-01.
fn civil_date(mut days: u64) -> (u64, u64, u64, u64) {
    let leap = |year: u64| {
        year.is_multiple_of(4) && (!year.is_multiple_of(100) || year.is_multiple_of(400))
    };
    let mut year = 1970;
    while days >= 365 + u64::from(leap(year)) {
        days -= 365 + u64::from(leap(year));
        year += 1;
    }
    let day_of_year = days + 1;
    let february = 28 + u64::from(leap(year));
    let mut month = 1;
    for length in [31, february, 31, 30, 31, 30, 31, 31, 30, 31, 30, 31] {
        if days < length {
            break;
        }
        days -= length;
        month += 1;
    }
    (year, month, days + 1, day_of_year)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::time::Duration;

    fn at(seconds: u64, format: &str) -> Result<String, String> {
        format_utc(format, UNIX_EPOCH + Duration::from_secs(seconds))
    }

    #[test]
    fn known_instants() {
        assert_eq!(
            at(0, "%A %d %B %Y %H:%M:%S").unwrap(),
            "Thursday 01 January 1970 00:00:00"
        );
        // 2024-02-29 13:05:09 UTC, a leap day.
        assert_eq!(
            at(1_709_211_909, "%d %b %Y|%j|%I %p|%-m/%-d/%y").unwrap(),
            "29 Feb 2024|060|01 PM|2/29/24"
        );
        // 2000-12-31 23:59:59 UTC, the last second of a leap year divisible by 400.
        assert_eq!(
            at(978_307_199, "%F %T %a %e%%").unwrap(),
            "2000-12-31 23:59:59 Sun 31%"
        );
    }

    #[test]
    fn unknown_directive_is_named() {
        assert_eq!(
            at(0, "%Q").unwrap_err(),
            "strftime_now: directive %Q is not supported"
        );
        assert!(at(0, "%").is_err());
    }
}
