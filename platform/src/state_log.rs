//! A state that lasts, said when it begins, seldom while it lasts, and when it is over: what fails at a rate while something is
//! away would fill a disk, and hide what else went wrong.

use std::{
    fmt::Display,
    sync::{Mutex, PoisonError},
    time::{Duration, Instant},
};

/// The shortest time between two lines of a state that lasts; doubled with each, as far as [`LONGEST_SILENCE`].
const FIRST_SILENCE: Duration = Duration::from_secs(60);
/// What is away for days, like an agent that nobody has installed, is said once an hour.
const LONGEST_SILENCE: Duration = Duration::from_secs(3600);
/// A success ends a state only if nothing has failed for so long: what works now and then is not over.
const QUIET: Duration = Duration::from_secs(5);
/// Without any success to go by, nothing failed for so long.
const FORGOTTEN: Duration = Duration::from_secs(60);

/// The database, as the calls of this process find it. Readiness, which asks it every second, says when it is back.
pub static DATABASE: StateLog =
    StateLog::new("database unavailable", "database is available again");

/// One such state; a static of the file that sees it.
pub struct StateLog {
    began: &'static str,
    over: &'static str,
    state: Mutex<Option<State>>,
}

#[derive(Clone, Copy)]
struct State {
    began: Instant,
    failed: Instant,
    said: Instant,
    silence: Duration,
    failures: u64,
    left_out: u64,
}

/// What there is to say of a failure.
#[derive(Debug, PartialEq, Eq)]
enum Said {
    Began,
    /// It lasts: so many failures were left out since the last line.
    Lasts {
        left_out: u64,
    },
    Nothing,
}

impl StateLog {
    /// What its first line and its last one say.
    pub const fn new(began: &'static str, over: &'static str) -> Self {
        StateLog {
            began,
            over,
            state: Mutex::new(None),
        }
    }

    /// It failed, for this cause: WARN, or counted.
    pub fn failed(&self, cause: &dyn Display) {
        let now = Instant::now();
        let (ended, said) = {
            let mut state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
            let ended = over(&mut state, now, FORGOTTEN);
            (ended, fail(&mut state, now))
        };
        self.say_over(ended);
        match said {
            Said::Began => tracing::warn!(error = %cause, "{}", self.began),
            Said::Lasts { left_out } => {
                tracing::warn!(error = %cause, failures.left_out = left_out, "{}", self.began);
            }
            Said::Nothing => {}
        }
    }

    /// It works. INFO if that is news; may be called at any rate.
    pub fn works(&self) {
        let ended = {
            let mut state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
            over(&mut state, Instant::now(), QUIET)
        };
        self.say_over(ended);
    }

    fn say_over(&self, ended: Option<State>) {
        if let Some(state) = ended {
            let lasted = (state.failed - state.began).as_secs_f64();
            let State {
                failures, left_out, ..
            } = state;
            tracing::info!(
                failures,
                failures.left_out = left_out,
                lasted_s = lasted,
                "{}",
                self.over
            );
        }
    }
}

/// The state, if it is over because nothing has failed for as long as `quiet`.
fn over(state: &mut Option<State>, now: Instant, quiet: Duration) -> Option<State> {
    state.take_if(|state| now - state.failed >= quiet)
}

fn fail(state: &mut Option<State>, now: Instant) -> Said {
    let Some(state) = state else {
        *state = Some(State {
            began: now,
            failed: now,
            said: now,
            silence: FIRST_SILENCE,
            failures: 1,
            left_out: 0,
        });
        return Said::Began;
    };
    state.failed = now;
    state.failures += 1;
    if now - state.said < state.silence {
        state.left_out += 1;
        return Said::Nothing;
    }
    let left_out = std::mem::take(&mut state.left_out);
    state.said = now;
    state.silence = (state.silence * 2).min(LONGEST_SILENCE);
    Said::Lasts { left_out }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// What is said of a failure every `every` for as long as `during`, by the second.
    fn lines(every: Duration, during: Duration) -> Vec<(u64, Said)> {
        let (began, mut state, mut at) = (Instant::now(), None, Duration::ZERO);
        let mut lines = Vec::new();
        while at < during {
            let said = fail(&mut state, began + at);
            if said != Said::Nothing {
                lines.push((at.as_secs(), said));
            }
            at += every;
        }
        lines
    }

    #[test]
    fn a_storm_is_a_line_a_state_then_a_count() {
        let storm = lines(Duration::from_millis(100), Duration::from_secs(200));
        let expected = [
            (0, Said::Began),
            (60, Said::Lasts { left_out: 599 }),
            (180, Said::Lasts { left_out: 1199 }),
        ];
        assert_eq!(storm, expected);
        // an agent that nobody has installed: a day has 86,400 failures
        let day = lines(Duration::from_secs(1), Duration::from_secs(86_400));
        assert!(day.len() <= 30, "{}", day.len());
    }

    #[test]
    fn it_is_over_once_and_only_when_nothing_fails_any_more() {
        let (began, mut state) = (Instant::now(), None);
        let after = |ms| began + Duration::from_millis(ms);
        assert_eq!(over(&mut state, after(0), QUIET).map(|_| ()), None);
        fail(&mut state, after(0));
        // one call of ten fails, the others work: it is not over
        for ms in (100..20_000).step_by(100) {
            assert!(over(&mut state, after(ms), QUIET).is_none());
            if ms % 1_000 == 0 {
                assert_eq!(fail(&mut state, after(ms)), Said::Nothing);
            }
        }
        let ended = over(&mut state, after(24_000), QUIET).expect("over");
        assert_eq!((ended.failures, ended.left_out), (20, 19));
        assert!(over(&mut state, after(30_000), QUIET).is_none());
        assert_eq!(fail(&mut state, after(30_000)), Said::Began);
    }
}
