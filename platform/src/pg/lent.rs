//! A connection on loan, and what becomes of it.

use std::{
    sync::{Arc, atomic::Ordering},
    time::Duration,
};

use tokio::{sync::OwnedSemaphorePermit, time::Instant};

use super::{
    database::State,
    db::Db,
    error::Error,
    gauges::Counted,
    pool::{Inner, Pool},
    queue::Permit,
};

/// How long a connection whose work has failed may take to show that it is well, while its caller
/// waits.
const CHECK_BOUND: Duration = Duration::from_secs(1);

/// What a connection counts as while it is used, or its answer is waited for.
#[expect(dead_code, reason = "held until it is dropped")]
pub(super) enum Place {
    Own(Permit),
    Extra(OwnedSemaphorePermit),
}

/// A connection, and when it is replaced by a new one, so that changes on the way to the server are
/// noticed.
pub(super) struct Session {
    pub(super) db: Db,
    pub(super) retires: Instant,
}

/// A connection on loan. If it is dropped before it is given back, its caller left in the middle of
/// a statement, and a task waits for the answer.
pub(super) struct Lent {
    pool: Pool,
    pub(super) lent: Option<(Session, Place)>,
    _in_use: Counted,
}

impl Lent {
    pub(super) fn new(pool: &Pool, session: Session, place: Place) -> Lent {
        Lent {
            pool: pool.clone(),
            lent: Some((session, place)),
            _in_use: Counted::new(&pool.0.gauges.in_use),
        }
    }

    pub(super) fn db(&mut self) -> Result<&mut Db, Error> {
        let lent = self.lent.as_mut();
        lent.map(|(session, _)| &mut session.db)
            .ok_or_else(Error::silent)
    }

    /// Puts it back into the pool if it is well. The server is asked only after a failure, or when a
    /// transaction was left open, which would keep its locks until the connection is used again.
    pub(super) async fn give_back(mut self, failed: bool) {
        let Ok(db) = self.db() else { return };
        let well = if failed || db.is_open() {
            tokio::time::timeout(CHECK_BOUND, db.settle()).await
        } else {
            Ok(Ok(true))
        };
        match well {
            Ok(Ok(true)) => {
                let inner = self.pool.0.clone();
                inner.offer(self);
            }
            // silent: dropped, it is waited for
            Err(_) => self.pool.distrust(),
            Ok(found) => {
                self.lent = None;
                self.pool.distrust();
                if matches!(found, Ok(false)) {
                    self.pool.database().note(State::ReadOnly);
                }
            }
        }
    }
}

impl Drop for Lent {
    fn drop(&mut self) {
        if let Some((session, place)) = self.lent.take() {
            self.pool.reap(session, place);
        }
    }
}

/// Counts a connection whose caller has left and whose answer is still to come.
pub(super) struct Abandoned {
    pool: Arc<Inner>,
    _shown: Counted,
}

impl Abandoned {
    pub(super) fn new(pool: &Arc<Inner>) -> Abandoned {
        pool.abandoned.fetch_add(1, Ordering::Relaxed);
        Abandoned {
            pool: pool.clone(),
            _shown: Counted::new(&pool.gauges.abandoned),
        }
    }
}

impl Drop for Abandoned {
    fn drop(&mut self) {
        self.pool.abandoned.fetch_sub(1, Ordering::Relaxed);
    }
}
