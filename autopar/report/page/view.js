// One report as it is looked at: which rank is chosen, and who wants to know.

class View {
  constructor(report) {
    this.report = report;
    this.rank = 0;
    this.listeners = [];
  }

  onRank(listener) {
    this.listeners.push(listener);
    listener(this.coordinates(this.rank), this.rank);
  }

  choose(rank) {
    if (!Number.isInteger(rank) || rank < 0 || rank >= this.report.ranks) return;
    this.rank = rank;
    for (const listener of this.listeners) listener(this.coordinates(rank), rank);
  }

  // Axis -> position: the last axis varies fastest.
  coordinates(rank) {
    const found = {};
    for (const axis of [...this.report.axes].reverse()) {
      found[axis.name] = rank % axis.size;
      rank = Math.floor(rank / axis.size);
    }
    return found;
  }

  numberOf(coordinates) {
    return this.report.axes.reduce((rank, axis) => rank * axis.size + (coordinates[axis.name] ?? 0), 0);
  }

  get place() {
    return this.coordinates(this.rank).pp ?? 0;
  }

  get largest() {
    return this.report.memory.reduce((most, one) => (most && most.peak >= one.peak ? most : one), null);
  }

  get mostSent() {
    return Math.max(0, ...[...new Set(this.report.traffic.map((one) => one.place))].map((place) => this.sent(place)));
  }

  sent(place) {
    return this.report.traffic.filter((one) => one.place === place).reduce((sum, one) => sum + one.bytes, 0);
  }
}
