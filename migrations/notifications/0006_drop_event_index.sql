-- no-transaction
-- What a build that was cut has left of the next file's index.
DROP INDEX CONCURRENTLY IF EXISTS notifications.message_event_unique;
