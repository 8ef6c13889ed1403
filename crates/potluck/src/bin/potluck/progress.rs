//! Owns what is seen of work under way, on stderr: a bar on a terminal, else a line every ten
//! seconds. Never knows what the work is, nor says how it ended: that is the verb's last line.

use std::io::{self, IsTerminal};
use std::time::{Duration, Instant};

use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};

use crate::process::Context;
use crate::render::{count, err, pair, plain, rate, span};

/// Between two lines where stderr is no terminal.
const LINE_EVERY: Duration = Duration::from_secs(10);

/// Shows how far something is.
pub(crate) struct Meter {
    look: Look,
    began: Option<Instant>,
}

enum Look {
    Silent,
    Bar(ProgressBar),
    Lines { next: Instant },
}

impl Meter {
    pub(crate) fn new(cx: &Context) -> Self {
        let look = if cx.json || cx.quiet {
            Look::Silent
        } else if io::stderr().is_terminal() {
            let bar = ProgressBar::with_draw_target(None, ProgressDrawTarget::stderr_with_hz(10));
            // A template that does not parse would show the default bar: no reason to fail.
            if let Ok(style) =
                ProgressStyle::with_template("{percent:>3} % {bar:20.cyan} {wide_msg}")
            {
                bar.set_style(style.progress_chars("█▉▊▋▌▍▎▏ "));
            }
            Look::Bar(bar)
        } else {
            Look::Lines { next: Instant::now() + LINE_EVERY }
        };
        Self { look, began: None }
    }

    /// `done` of `total` bytes, at a rate measured here; `what` is being done.
    pub(crate) fn hashed(&mut self, what: &str, done: u64, total: u64) {
        let seconds = self.began.get_or_insert_with(Instant::now).elapsed().as_secs_f64();
        let speed = if seconds > 0.5 { done as f64 / seconds } else { 0.0 };
        let mut text = format!("{what}  {}", pair(done, total));
        text.push_str(&pace(done, total, speed as u64));
        self.show(done, total, text);
    }

    /// A fetch: `waiting` says why it does not move, where it does not.
    pub(crate) fn fetched(
        &mut self,
        (done, total): (u64, u64),
        speed: u64,
        sources: u32,
        waiting: Option<&str>,
    ) {
        let mut text = pair(done, total);
        if let Some(why) = waiting {
            text.push_str("  waiting: ");
            text.push_str(&plain(why));
        } else {
            text.push_str(&pace(done, total, speed));
            if sources > 0 {
                text.push_str(&format!("  from {}", count(sources.into(), "peer", "peers")));
            }
        }
        self.show(done, total, text);
    }

    fn show(&mut self, done: u64, total: u64, text: String) {
        match &mut self.look {
            Look::Silent => {}
            Look::Bar(bar) => {
                bar.set_length(total.max(1));
                bar.set_position(if total == 0 { 1 } else { done });
                bar.set_message(text);
            }
            Look::Lines { next } => {
                if Instant::now() >= *next {
                    *next += LINE_EVERY;
                    let percent = done.saturating_mul(100).checked_div(total).unwrap_or(100);
                    err(&format!("{percent:>3} %  {text}"));
                }
            }
        }
    }
}

impl Drop for Meter {
    /// Takes the bar away.
    fn drop(&mut self) {
        if let Look::Bar(bar) = &self.look {
            bar.finish_and_clear();
        }
    }
}

/// `  112 MB/s  17 min left`; nothing where it stands still.
fn pace(done: u64, total: u64, speed: u64) -> String {
    let Some(left) = total.saturating_sub(done).checked_div(speed) else { return String::new() };
    let left = match left {
        0 => String::new(),
        seconds => format!("  {} left", span(Duration::from_secs(seconds))),
    };
    format!("  {}{left}", rate(speed))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_pace_says_how_long_it_will_take_unless_it_stands_still() {
        assert_eq!(pace(0, 112_000_000 * 1020, 112_000_000), "  112 MB/s  17 min left");
        assert_eq!(pace(10, 10, 5), "  5 B/s");
        assert_eq!(pace(1, 10, 0), "");
    }
}
