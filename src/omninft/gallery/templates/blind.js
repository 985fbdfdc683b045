// The blind test of the comparison page: which of two clips is better, by somebody who cannot know whose they are.
(() => {
  "use strict";

  const { groups, data, pair, isMeant, apply, visit } = window.omninft;
  const find = (name) => document.querySelector(`[data-${name}]`);
  const body = document.body;
  const labels = groups.map((group) => group.root.getAttribute("aria-label"));
  const voteButtons = [...document.querySelectorAll("[data-vote]")];
  let test = null; // the session while it goes on

  // Two-sided exact binomial test of "both are equally likely": the chance of a split at least as uneven.
  function binomialTest(wins, total) {
    if (!total) return null;
    const few = Math.min(wins, total - wins);
    let logTerm = -total * Math.LN2; // of C(total, i) / 2^total
    let sum = Math.exp(logTerm);
    for (let i = 1; i <= few; i += 1) {
      logTerm += Math.log((total - i + 1) / i);
      sum += Math.exp(logTerm);
    }
    return Math.min(1, 2 * sum);
  }

  // Wilson's 95 % interval of a share.
  function wilson(wins, total) {
    if (!total) return null;
    const z = 1.959963984540054;
    const share = wins / total;
    const middle = (share + (z * z) / (2 * total)) / (1 + (z * z) / total);
    const half = (z / (1 + (z * z) / total)) * Math.sqrt((share * (1 - share)) / total + (z * z) / (4 * total * total));
    return [Math.max(0, middle - half), Math.min(1, middle + half)];
  }

  // 32 well mixed bits of a text (FNV-1a, then the finaliser of MurmurHash3).
  function bits(text) {
    let h = 0x811c9dc5;
    for (const byte of new TextEncoder().encode(text)) h = Math.imul(h ^ byte, 0x01000193);
    h = Math.imul(h ^ (h >>> 16), 0x85ebca6b);
    h = Math.imul(h ^ (h >>> 13), 0xc2b2ae35);
    return (h ^ (h >>> 16)) >>> 0;
  }

  const memory = new Map();
  const storage = {
    isLasting: true,
    read(name) {
      try {
        return localStorage.getItem(name) ?? memory.get(name) ?? null;
      } catch {
        this.isLasting = false;
        return memory.get(name) ?? null;
      }
    },
    write(name, text) {
      memory.set(name, text);
      try {
        localStorage.setItem(name, text);
      } catch {
        this.isLasting = false;
      }
    },
  };

  class BlindTest {
    constructor([first, second]) {
      this.systems = [first, second];
      this.name = `omninft-votes/${data.page}/${first}-${second}`;
      this.state = this.restored() ?? { seed: data.seed ?? Math.floor(Math.random() * 1e6), rater: "", revealed: null, votes: {} };
      this.place = 0;
      this.shuffle();
    }

    restored() {
      try {
        const state = JSON.parse(storage.read(this.name));
        return state && typeof state.votes === "object" && Number.isFinite(state.seed) ? state : null;
      } catch {
        return null;
      }
    }

    save() { storage.write(this.name, JSON.stringify(this.state)); }

    // Pairs that both have a clip, in an order that tells nothing of their scores.
    shuffle() {
      const order = (index) => bits(`${this.state.seed}|order|${data.prompts[index].key}`);
      this.queue = groups.map((_, index) => index)
        .filter((index) => isMeant(index) && this.systems.every((system) => data.prompts[index].shown[system]))
        .sort((a, b) => order(a) - order(b) || a - b);
    }

    get index() { return this.queue[this.place]; }

    get vote() { return this.state.votes[data.prompts[this.index].key]; }

    // The systems on the left and on the right of the prompt `index`.
    sides(index) {
      const [first, second] = this.systems;
      return bits(`${this.state.seed}|side|${data.prompts[index].key}`) & 1 ? [second, first] : [first, second];
    }

    cast(choice) {
      const [left, right] = this.sides(this.index);
      this.state.votes[data.prompts[this.index].key] = {
        choice,
        left,
        right,
        winner: { left, right }[choice] ?? null,
        after_result: this.state.revealed !== null, // who knows the result is no longer blind to it
        time: new Date().toISOString(),
      };
      this.save();
    }

    // The next pair without a vote, from the present one on and round; -1 when all have one.
    get open() {
      const places = this.queue.map((_, step) => (this.place + step) % this.queue.length);
      return places.find((place) => !this.state.votes[data.prompts[this.queue[place]].key]) ?? -1;
    }

    get judged() { return this.queue.filter((index) => this.state.votes[data.prompts[index].key]).length; }

    get rows() {
      return data.prompts.filter((prompt) => this.state.votes[prompt.key]).map((prompt) => {
        const vote = this.state.votes[prompt.key];
        const name = (system) => (system === null ? "" : data.systems[system]);
        return {
          prompt_id: prompt.prompt_id, sample: prompt.sample, prompt: prompt.prompt, left: name(vote.left),
          right: name(vote.right), choice: vote.choice, winner: name(vote.winner), after_result: vote.after_result,
          rater: this.state.rater, seed: this.state.seed, time: vote.time,
        };
      });
    }

    get result() {
      const votes = Object.values(this.state.votes);
      const count = (test) => votes.filter(test).length;
      const wins = this.systems.map((system) => count((vote) => vote.winner === system));
      const decided = wins[0] + wins[1];
      const interval = wilson(wins[1], decided);
      return {
        systems: this.systems.map((system) => data.systems[system]),
        preferred: wins,
        ties: count((vote) => vote.choice === "tie"),
        skipped: count((vote) => vote.choice === "skip"),
        left: count((vote) => vote.choice === "left"),
        right: count((vote) => vote.choice === "right"),
        share_of_second: decided ? wins[1] / decided : null,
        wilson_95: interval,
        p_value: binomialTest(wins[1], decided),
        votes_after_result: count((vote) => vote.after_result),
      };
    }
  }

  function begin() {
    const systems = pair();
    const next = new BlindTest(systems);
    if (systems[0] === systems[1] || !next.queue.length) {
      find("count").textContent = systems[0] === systems[1]
        ? "A blind test needs two different systems." : "None of these prompts has a clip of both systems.";
      return;
    }
    test = next;
    test.place = Math.max(test.open, 0);
    body.classList.add("blind");
    document.querySelectorAll("[data-blind]").forEach((part) => { part.hidden = false; });
    groups.forEach((group) => { group.pause(); group.root.hidden = true; });
    find("nothing").hidden = true;
    find("result").replaceChildren();
    find("rater").value = test.state.rater;
    find("seed").value = test.state.seed;
    if (test.state.revealed) showResult();
    show();
  }

  function end() {
    test = null;
    body.classList.remove("blind");
    document.querySelectorAll("[data-blind]").forEach((part) => { part.hidden = true; });
    groups.forEach((group, index) => {
      group.arrange(data.systems.map((_, system) => system));
      group.root.setAttribute("aria-label", labels[index]);
    });
    apply();
    find("blind-start").focus();
  }

  function show() {
    groups.forEach((group) => { if (!group.root.hidden) { group.pause(); group.root.hidden = true; } });
    const group = groups[test.index];
    group.arrange(test.sides(test.index), ["Left", "Right"]);
    group.root.hidden = false;
    group.root.setAttribute("aria-label", `Pair ${test.place + 1} of ${test.queue.length}`);
    group.load("auto");
    visit(group);
    window.scrollTo({ top: 0, behavior: "instant" });
    if (test.place + 1 < test.queue.length) groups[test.queue[test.place + 1]].load("auto");
    tell();
  }

  function tell() {
    const [count, all] = [test.judged, test.queue.length];
    find("progress").textContent = `Pair ${test.place + 1} of ${all}, ${count === all ? "all" : count} judged`;
    voteButtons.forEach((button) => button.setAttribute("aria-pressed", String(test.vote?.choice === button.dataset.vote)));
    find("seed").disabled = Object.keys(test.state.votes).length > 0;
    find("previous").disabled = test.place === 0;
    find("next").disabled = test.place === all - 1;
    find("keeping").textContent = storage.isLasting
      ? "Votes are kept in this browser. The seed is fixed with the first vote. Looking at the result ends the blindness: later votes are marked."
      : "This browser keeps nothing: save the votes before the page is closed.";
    if (test.state.revealed) showResult();
  }

  function vote(choice) {
    const wasPlaying = groups[test.index].playing;
    test.cast(choice);
    const open = test.open;
    if (open < 0) {
      tell();
      return;
    }
    test.place = open;
    show();
    if (wasPlaying) groups[test.index].play();
  }

  function move(step) {
    test.place = Math.min(Math.max(test.place + step, 0), test.queue.length - 1);
    show();
  }

  function showResult() {
    if (!test.state.revealed) {
      test.state.revealed = new Date().toISOString();
      test.save();
    }
    const result = test.result;
    const decided = result.preferred[0] + result.preferred[1];
    const rows = [
      ...result.systems.map((name, i) => [`${name} preferred`, result.preferred[i]]),
      ["Ties", result.ties], ["Skipped", result.skipped],
    ];
    const table = document.createElement("table");
    rows.forEach(([name, count]) => {
      const row = table.createTBody().insertRow();
      const head = document.createElement("th");
      head.scope = "row";
      head.textContent = name;
      row.append(head);
      const cell = row.insertCell();
      cell.className = "num";
      cell.textContent = count;
    });
    const verdict = document.createElement("p");
    verdict.className = "verdict";
    if (decided) {
      const [low, high] = result.wilson_95.map((share) => `${(100 * share).toFixed(0)}\u00a0%`);
      const p = result.p_value < 0.001 ? "p\u00a0<\u00a00.001" : `p\u00a0=\u00a0${result.p_value.toFixed(3)}`;
      verdict.textContent = `${result.systems[1]} was preferred in ${(100 * result.share_of_second).toFixed(0)}\u00a0% of ${decided} decided votes, 95 % interval ${low} to ${high}; ${p}.`;
    } else {
      verdict.textContent = "No vote has preferred one of the two yet.";
    }
    const note = document.createElement("p");
    note.className = "note";
    note.textContent = `Exact two-sided binomial test against an even split, ties and skips left out; Wilson interval. It holds for a number of votes fixed before looking. Left was preferred ${result.left} times, right ${result.right}.`
      + (result.votes_after_result ? ` ${result.votes_after_result} votes came after the result was shown.` : "");
    find("result").replaceChildren(table, verdict, note);
  }

  function save(kind) {
    const rows = test.rows;
    let text = JSON.stringify({
      format: "omninft-votes/1", page: data.page, rater: test.state.rater, seed: test.state.seed,
      result_shown: test.state.revealed, result: test.result, votes: rows,
    }, null, 1);
    if (kind === "csv") {
      const names = ["prompt_id", "sample", "prompt", "left", "right", "choice", "winner", "after_result", "rater", "seed", "time"];
      const cell = (value) => `"${String(value).replaceAll('"', '""')}"`;
      text = [names.join(","), ...rows.map((row) => names.map((name) => cell(row[name])).join(","))].join("\r\n") + "\r\n";
    }
    const link = document.createElement("a");
    link.href = URL.createObjectURL(new Blob([text], { type: kind === "csv" ? "text/csv" : "application/json" }));
    const rater = test.state.rater.replace(/[^\p{L}\p{N}]+/gu, "-").replace(/^-|-$/g, "");
    link.download = ["votes", rater, data.page].filter(Boolean).join("-") + `.${kind}`;
    link.click();
    setTimeout(() => URL.revokeObjectURL(link.href), 10000);
  }

  voteButtons.forEach((button) => button.addEventListener("click", () => vote(button.dataset.vote)));
  document.querySelectorAll("[data-export]").forEach((button) => button.addEventListener("click", () => save(button.dataset.export)));
  find("blind-start").addEventListener("click", begin);
  find("blind-end").addEventListener("click", end);
  find("previous").addEventListener("click", () => move(-1));
  find("next").addEventListener("click", () => move(1));
  find("reveal").addEventListener("click", showResult);
  find("clear").addEventListener("click", () => {
    if (!window.confirm("Delete all votes of this pair of systems?")) return;
    test.state.votes = {};
    test.state.revealed = null;
    test.save();
    find("result").replaceChildren();
    tell();
  });
  find("rater").addEventListener("change", (event) => { test.state.rater = event.target.value.trim(); test.save(); });
  find("seed").addEventListener("change", (event) => {
    const seed = event.target.valueAsNumber;
    if (!Number.isInteger(seed) || seed < 0) return;
    test.state.seed = seed;
    test.save();
    test.shuffle();
    test.place = 0;
    show();
  });

  document.addEventListener("keydown", (event) => {
    if (!test || event.ctrlKey || event.metaKey || event.altKey || event.target.closest("input, select, textarea, dialog")) return;
    const choice = { ArrowLeft: "left", ArrowRight: "right", ArrowDown: "tie", s: "skip", S: "skip" }[event.key];
    if (choice) vote(choice);
    else if (event.key.toLowerCase() === "n") move(1);
    else if (event.key.toLowerCase() === "p") move(-1);
    else return;
    event.preventDefault();
    event.stopImmediatePropagation();
  }, true);

  Object.assign(window.omninft, {
    statistics: { binomialTest, wilson, bits },
    toggleBlind: () => (test ? end() : begin()),
  });
})();
