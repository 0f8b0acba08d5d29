//! The points at which crash tests end the process: on both sides of every commit, and where the broker has events that
//! the database still holds. With the feature `failpoints`, in test builds only, the environment variable `FAILPOINTS`
//! says which and when (`order-placing=3*off->return`: the fourth time); without it a point is an empty function.

/// Each of them.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum CrashPoint {
    /// A batch of orders is written, not committed.
    OrderPlacing,
    /// A batch of orders is committed, nobody has been answered.
    OrderPlaced,
    /// A payment or cancellation is written, not committed.
    OrderSettling,
    /// A payment or cancellation is committed, its caller has not been answered and the relay not been woken.
    OrderSettled,
    /// The cancellation of unpaid orders is written, not committed.
    OrderExpiring,
    /// The cancellation of unpaid orders is committed.
    OrderExpired,
    /// A delivery is written, not committed.
    StockReceiving,
    /// A delivery is committed, its caller has not been answered.
    StockReceived,
    /// Events are read, none has been handed to the producer.
    EventsProducing,
    /// The producer has all of the batch; what the broker has got is unknown.
    EventsProduced,
    /// The broker has acknowledged, the rows are still in the outbox.
    EventsAcknowledged,
    /// The rows are deleted, not committed.
    EventsDeleting,
    /// The rows are gone.
    EventsDeleted,
    /// A slice of an import is written, not committed.
    SliceImporting,
    /// A slice of an import is committed.
    SliceImported,
}

impl CrashPoint {
    /// Those of a service at work; the others are of commands.
    #[cfg(feature = "failpoints")]
    pub const ALL: [CrashPoint; 13] = [
        CrashPoint::OrderPlacing,
        CrashPoint::OrderPlaced,
        CrashPoint::OrderSettling,
        CrashPoint::OrderSettled,
        CrashPoint::OrderExpiring,
        CrashPoint::OrderExpired,
        CrashPoint::StockReceiving,
        CrashPoint::StockReceived,
        CrashPoint::EventsProducing,
        CrashPoint::EventsProduced,
        CrashPoint::EventsAcknowledged,
        CrashPoint::EventsDeleting,
        CrashPoint::EventsDeleted,
    ];

    /// As `FAILPOINTS` names it.
    #[cfg(feature = "failpoints")]
    pub fn name(self) -> &'static str {
        match self {
            CrashPoint::OrderPlacing => "order-placing",
            CrashPoint::OrderPlaced => "order-placed",
            CrashPoint::OrderSettling => "order-settling",
            CrashPoint::OrderSettled => "order-settled",
            CrashPoint::OrderExpiring => "order-expiring",
            CrashPoint::OrderExpired => "order-expired",
            CrashPoint::StockReceiving => "stock-receiving",
            CrashPoint::StockReceived => "stock-received",
            CrashPoint::EventsProducing => "events-producing",
            CrashPoint::EventsProduced => "events-produced",
            CrashPoint::EventsAcknowledged => "events-acknowledged",
            CrashPoint::EventsDeleting => "events-deleting",
            CrashPoint::EventsDeleted => "events-deleted",
            CrashPoint::SliceImporting => "slice-importing",
            CrashPoint::SliceImported => "slice-imported",
        }
    }

    /// Ends the process here, as `kill -9` would, if a crash test asked for it; `return(stop)` freezes it instead.
    pub(crate) fn pass(self) {
        fail::fail_point!(self.name(), |how: Option<String>| match how.as_deref() {
            Some("stop") => stop(),
            _ => std::process::abort(),
        });
    }
}

/// Stops all of the process where it is, until somebody sends it SIGCONT.
#[cfg(feature = "failpoints")]
fn stop() {
    let stopped = std::process::Command::new("kill")
        .args(["-STOP", &std::process::id().to_string()])
        .status();
    assert!(stopped.is_ok_and(|status| status.success()), "no kill");
}
