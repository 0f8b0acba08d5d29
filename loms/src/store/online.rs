//! What `migrate` does in place of released files that would keep orders or payments from the tables they build an index on,
//! or check: about a second for a million rows. The schema becomes the same; a test compares the two.

use platform::migrate::{Online, Step};

pub(crate) const ONLINE: [Online; 4] = [
    Online {
        version: 5,
        before: &[
            Step::Concurrent(
                "DROP INDEX CONCURRENTLY IF EXISTS loms.idempotency_key_created_at_next",
            ),
            Step::Concurrent(
                "CREATE INDEX CONCURRENTLY idempotency_key_created_at_next ON loms.idempotency_key (created_at)",
            ),
        ],
        then: "DROP INDEX loms.idempotency_key_created_at_idx;
               ALTER INDEX loms.idempotency_key_created_at_next RENAME TO idempotency_key_created_at_idx",
    },
    Online {
        version: 6,
        before: &[
            Step::Brief(
                "ALTER TABLE loms.status_change
                     DROP CONSTRAINT IF EXISTS status_change_legal_next,
                     ADD CONSTRAINT status_change_legal_next CHECK ((
                            (sequence = 1 AND from_status IS NULL AND to_status = 'new')
                         OR (sequence = 2 AND from_status = 'new' AND to_status IN ('awaiting payment', 'failed'))
                         OR (sequence = 3 AND from_status = 'awaiting payment' AND to_status IN ('payed', 'cancelled'))
                     ) IS TRUE) NOT VALID",
            ),
            Step::Concurrent(
                "ALTER TABLE loms.status_change VALIDATE CONSTRAINT status_change_legal_next",
            ),
        ],
        then: "ALTER TABLE loms.status_change DROP CONSTRAINT status_change_legal;
               ALTER TABLE loms.status_change RENAME CONSTRAINT status_change_legal_next TO status_change_legal",
    },
    Online {
        version: 7,
        before: &[
            Step::Concurrent("DROP INDEX CONCURRENTLY IF EXISTS loms.write_off_sku_next"),
            Step::Concurrent("CREATE INDEX CONCURRENTLY write_off_sku_next ON loms.write_off (sku)"),
        ],
        then: "ALTER INDEX loms.write_off_sku_next RENAME TO write_off_sku_idx",
    },
    Online {
        version: 9,
        before: &[
            Step::Concurrent("DROP INDEX CONCURRENTLY IF EXISTS loms.write_off_sku_next"),
            Step::Concurrent(
                "CREATE INDEX CONCURRENTLY write_off_sku_next ON loms.write_off (sku) INCLUDE (warehouse_id, count)",
            ),
        ],
        then: "DROP INDEX loms.write_off_sku_idx;
               ALTER INDEX loms.write_off_sku_next RENAME TO write_off_sku_idx;
               ALTER TABLE loms.write_off SET (autovacuum_vacuum_insert_scale_factor = 0.01)",
    },
];
