-- no-transaction
-- The rows that are not in message_event_unique: few, those of the release before and the superseded ones.
CREATE INDEX CONCURRENTLY message_event_other ON notifications.message (order_id, status, user_id)
    WHERE superseded IS NOT FALSE;
