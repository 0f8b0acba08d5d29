//! What `migrate` does in place of a released file that would keep the consumer and the sender from the table it builds an
//! index on. The schema becomes the same; a test compares the two.

use platform::migrate::{Online, Step};

pub(crate) const ONLINE: [Online; 1] = [Online {
    version: 3,
    before: &[
        Step::Concurrent(
            "DROP INDEX CONCURRENTLY IF EXISTS notifications.message_untold_of_order",
        ),
        Step::Concurrent(
            "CREATE INDEX CONCURRENTLY message_untold_of_order ON notifications.message (order_id, sequence, id)
             WHERE COALESCE(told_at, given_up_at) IS NULL",
        ),
    ],
    then: "DROP INDEX notifications.message_untold_by_order",
}];
