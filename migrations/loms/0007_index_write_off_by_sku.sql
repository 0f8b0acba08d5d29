-- The sampled audit sums what was sold of a few SKUs every few minutes. This table only grows; without the index each sample
-- would read all of it. The other tables that it sums are small: unpaid orders, stock, deliveries.
CREATE INDEX write_off_sku_idx ON loms.write_off (sku);
