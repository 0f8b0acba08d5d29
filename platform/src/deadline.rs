//! How long a call may take: the layers of the server say it, handlers pass it on.

use std::time::Duration;

use tokio::time::Instant;

/// Until when a call's answer is of use. Handlers pass it on, so that nobody works for a caller who has gone.
#[derive(Clone, Copy, Debug)]
pub struct Deadline(Instant);

impl Deadline {
    /// The deadline that the door gave to this call.
    pub fn of<T>(request: &tonic::Request<T>) -> Deadline {
        // a call that came around the door (there is none today) still gets a bound
        request
            .extensions()
            .get()
            .copied()
            .unwrap_or_else(|| Deadline::after(Duration::from_secs(5)))
    }

    pub fn after(duration: Duration) -> Deadline {
        Deadline(Instant::now() + duration)
    }

    pub fn remaining(&self) -> Duration {
        self.0.saturating_duration_since(Instant::now())
    }

    pub fn instant(&self) -> Instant {
        self.0
    }

    pub fn passed(&self) -> bool {
        self.remaining().is_zero()
    }
}
