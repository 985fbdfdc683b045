// Takes of one prompt side by side, played as one: one clock, one sound, one transport. Markup: players.html.j2.
// Without this script the videos keep their own controls. Other scripts of a page use window.omninft.
(() => {
  "use strict";

  const DRIFT_TOLERATED = 0.02; // s; below a frame at 24 Hz
  const DRIFT_SEEK = 0.15; // s; beyond this a take jumps, below it runs faster or slower
  const MAX_CORRECTION = 0.25; // of the speed; only of takes that are not heard
  const PATIENCE = 3000; // ms
  const NEAR = "400px"; // from the window: clips are made ready
  const FAR = "4000px"; // and let go again, for browsers keep only so many players
  const groups = [];
  const groupOf = new Map();
  let current = null;

  class PlayerGroup {
    constructor(root) {
      this.root = root;
      this.figures = [...root.querySelectorAll("[data-take]")];
      this.names = this.figures.map((take) => take.querySelector(".take-name").textContent);
      this.files = this.figures.map((take) => take.querySelector(".take-name").title);
      this.collect();
      this.duration = Number(root.dataset.duration);
      this.speed = 1;
      this.playing = false;
      this.attempt = 0; // number of the latest wish to play, so that a pause during loading wins
      this.controls = Object.fromEntries(
        ["play", "seek", "time", "loop", "speed"].map((name) => [name, root.querySelector(`[data-${name}]`)]),
      );
      root.querySelector("[data-transport]").hidden = this.videos.length === 0;
      if (this.videos.length) {
        this.listen();
        this.choose(this.videos.length - 1);
      }
    }

    // The takes that are shown and can be played, in the order in which they stand.
    collect() {
      const takes = [...this.root.querySelectorAll("[data-take]:not([hidden])")];
      this.takes = takes.filter((take) => take.querySelector("video"));
      this.videos = this.takes.map((take) => take.querySelector("video"));
      this.heads = this.takes.map((take) => take.querySelector(".playhead"));
    }

    // Shows the takes `order` (numbers as in the markup) and no other, from left to right, under `names` instead of
    // their own: then nothing that can be seen, heard or hovered over tells whose they are.
    arrange(order, names = null) {
      this.pause();
      this.figures.forEach((take) => { take.hidden = true; });
      order.forEach((index, place) => {
        const take = this.figures[index];
        const name = names ? names[place] : this.names[index];
        const label = take.querySelector(".take-name");
        const video = take.querySelector("video");
        take.hidden = false;
        take.parentElement.append(take);
        label.textContent = name;
        if (names || !this.files[index]) label.removeAttribute("title");
        else label.title = this.files[index];
        video?.setAttribute("aria-label", names ? name : `${name}: ${this.promptText}`);
      });
      this.collect();
      if (this.videos.length) this.choose(names ? 0 : this.videos.length - 1);
    }

    get promptText() { return this.root.querySelector(".prompt")?.textContent.trim() ?? ""; }

    listen() {
      const { play, seek, loop, speed } = this.controls;
      play.addEventListener("click", () => this.toggle());
      seek.addEventListener("input", () => this.seek(Number(seek.value)));
      loop.addEventListener("click", () => loop.setAttribute("aria-pressed", String(!this.loops)));
      speed.addEventListener("change", () => {
        this.speed = Number(speed.value);
        this.videos.forEach((video) => { video.playbackRate = this.speed; });
      });
      this.root.addEventListener("pointerdown", () => { current = this; });
      this.root.addEventListener("focusin", () => { current = this; });
      this.takes.forEach((take) => {
        const video = take.querySelector("video");
        video.controls = false;
        video.addEventListener("click", () => this.press(this.takes.indexOf(take)));
        video.addEventListener("ended", () => {
          if (this.videos.every((other) => other.ended || other.error)) this.finish();
        });
        video.addEventListener("error", () => {
          if (!take.querySelector(".absent")) {
            const source = video.getAttribute("src") ?? "";
            const note = document.createElement("p");
            note.className = "absent";
            note.textContent = `This browser cannot play ${/^(blob|data):/.test(source) ? "the clip" : decodeURIComponent(source)}.`;
            video.after(note);
          }
        });
        take.querySelector("[data-sound]")?.addEventListener("click", () => this.choose(this.takes.indexOf(take)));
        this.dragWave(take.querySelector("[data-wave]"));
      });
    }

    dragWave(box) {
      const seekTo = (event) => {
        const place = box.getBoundingClientRect();
        this.seek(((event.clientX - place.left) / place.width) * this.duration);
      };
      box.addEventListener("pointerdown", (event) => {
        box.setPointerCapture(event.pointerId);
        seekTo(event);
      });
      box.addEventListener("pointermove", (event) => {
        if (box.hasPointerCapture(event.pointerId)) seekTo(event);
      });
    }

    get loops() { return this.controls.loop.getAttribute("aria-pressed") === "true"; }

    // The take that is heard keeps the time, so that its sound is never bent; after its end, a longer one.
    get leader() {
      const heard = this.videos[this.sound];
      const isOver = (video) => video.error || video.ended;
      return isOver(heard) ? this.videos.find((video) => !isOver(video)) ?? heard : heard;
    }

    get isOver() { return this.videos.every((video) => video.error || video.currentTime >= video.duration - 0.02); }

    // Lets the take `index` be heard, and no other on the page.
    choose(index) {
      if (index >= this.videos.length) return;
      this.sound = index;
      this.videos.forEach((video, i) => { video.muted = i !== index; });
      this.takes.forEach((take, i) => {
        take.classList.toggle("is-heard", i === index && this.takes.length > 1);
        const button = take.querySelector("[data-sound]");
        if (!button) return;
        button.setAttribute("aria-pressed", String(i === index));
        button.textContent = i === index ? "sound on" : "sound off";
        button.setAttribute("aria-label", `${button.textContent}, ${take.querySelector(".take-name").textContent}`);
      });
    }

    press(index) {
      if (!this.playing) {
        this.choose(index);
        this.play();
      } else if (index !== this.sound) {
        this.choose(index);
      } else {
        this.pause();
      }
    }

    toggle() { if (this.playing) this.pause(); else this.play(); }

    load(amount) {
      this.videos.forEach((video) => {
        if (!video.hasAttribute("src")) {
          if (video.dataset.poster) video.poster = video.dataset.poster;
          video.src = playableSource(video.dataset.src);
          video.preload = amount;
        } else if (video.preload !== "auto") {
          video.preload = amount;
        }
      });
    }

    // Gives back what a lazy group has loaded.
    release() {
      if (this.playing) return;
      const lazy = this.videos.filter((video) => video.dataset.src && video.hasAttribute("src"));
      lazy.forEach((video) => {
        if (video.src.startsWith("blob:")) URL.revokeObjectURL(video.src);
        video.removeAttribute("src");
        video.preload = "none";
        video.load();
      });
      if (lazy.length) this.draw(0);
    }

    step(frames) {
      this.pause();
      const rate = Number(this.root.dataset.rate) || 24;
      const frame = Math.floor(this.leader.currentTime * rate + 0.01) + frames;
      this.seek((Math.max(frame, 0) + 0.5) / rate); // the middle of a frame is that frame in every browser
    }

    async play() {
      groups.forEach((group) => { if (group !== this) group.pause(); });
      current = this;
      this.show(true);
      const attempt = ++this.attempt;
      this.load("auto");
      await Promise.all(this.videos.map(canPlay));
      if (attempt !== this.attempt) return;
      this.seek(this.isOver ? 0 : this.leader.currentTime);
      await Promise.all(this.videos.map(settled));
      if (attempt !== this.attempt) return;
      this.videos.forEach((video) => { video.playbackRate = this.speed; });
      try {
        await Promise.all(this.videos.filter((video) => !video.error).map((video) => video.play()));
      } catch (error) {
        // A pause that came in between, or a browser that wants another click first.
        if (attempt === this.attempt) this.pause();
        return;
      }
      if (attempt === this.attempt) requestAnimationFrame(() => this.tick(attempt));
    }

    pause() {
      this.attempt += 1;
      this.videos.forEach((video) => video.pause());
      this.show(false);
    }

    finish() {
      if (this.playing && this.loops) {
        this.seek(0);
        this.play();
      } else {
        this.pause();
      }
    }

    seek(time) {
      const target = Math.min(Math.max(time, 0), this.duration);
      this.load("auto");
      this.videos.forEach((video) => {
        const end = Number.isFinite(video.duration) ? video.duration : this.duration;
        video.currentTime = Math.min(target, end);
      });
      this.draw(target);
    }

    tick(attempt) {
      if (attempt !== this.attempt) return;
      const leader = this.leader;
      const time = leader.currentTime;
      this.videos.forEach((video) => {
        if (video === leader || video.ended || video.seeking || time >= video.duration) return;
        const drift = video.currentTime - time;
        if (Math.abs(drift) > DRIFT_SEEK) video.currentTime = time;
        const bend = Math.abs(drift) > DRIFT_TOLERATED ? Math.max(-1, Math.min(1, -4 * drift)) * MAX_CORRECTION : 0;
        video.playbackRate = this.speed * (1 + bend);
      });
      leader.playbackRate = this.speed;
      this.draw(time);
      requestAnimationFrame(() => this.tick(attempt));
    }

    draw(time) {
      const x = String(Math.min(time / this.duration, 1) * 1000);
      this.heads.forEach((head) => {
        head.setAttribute("x1", x);
        head.setAttribute("x2", x);
      });
      this.controls.seek.value = String(time);
      this.controls.time.textContent = `${time.toFixed(2)} / ${this.duration.toFixed(2)} s`;
    }

    show(playing) {
      this.playing = playing;
      this.controls.play.textContent = playing ? "Pause" : "Play";
      this.root.classList.toggle("is-playing", playing);
    }

    get isVisible() {
      const place = this.root.getBoundingClientRect();
      return place.bottom > 80 && place.top < window.innerHeight - 80;
    }
  }

  // Resolves on the event, on an error, or after a while: some browsers load nothing before play() is called.
  function comes(video, event) {
    return new Promise((resolve) => {
      [event, "error"].forEach((name) => video.addEventListener(name, resolve, { once: true }));
      setTimeout(resolve, PATIENCE);
    });
  }

  function canPlay(video) { return video.readyState >= 3 || video.error ? null : comes(video, "canplay"); }

  // Data in the page becomes a blob: players seek in those, and data URLs may be cut at some length.
  function playableSource(source) {
    if (!source.startsWith("data:")) return source;
    const [head, body] = source.split(",");
    const bytes = Uint8Array.from(atob(body), (letter) => letter.charCodeAt(0));
    return URL.createObjectURL(new Blob([bytes], { type: head.slice(5).split(";")[0] }));
  }

  function settled(video) { return !video.seeking || video.error ? null : comes(video, "seeked"); }

  function inOrder() {
    return [...document.querySelectorAll("[data-players]:not([hidden])")].map((root) => groupOf.get(root));
  }

  function active() {
    if (current && current.isVisible) return current;
    return inOrder().find((group) => group.isVisible) ?? null;
  }

  function go(step) {
    const order = inOrder();
    const from = active();
    const next = order[order.indexOf(from) + step];
    if (!next) return;
    const goesOn = from.playing;
    from.pause();
    visit(next);
    if (goesOn) next.play();
  }

  function visit(group) {
    current = group;
    group.root.focus({ preventScroll: true });
    group.root.scrollIntoView({ block: "center" });
  }

  document.addEventListener("keydown", (event) => {
    if (event.ctrlKey || event.metaKey || event.altKey) return;
    const target = event.target;
    if (target.closest("input, select, textarea, [data-hover]")) return;
    if (event.key === " " && target.closest("button, summary, a")) return;
    const group = active();
    if (!group || !group.videos.length) return;
    if (event.key === " ") group.toggle();
    else if (event.key === "ArrowRight") go(1);
    else if (event.key === "ArrowLeft") go(-1);
    else if (event.key === ",") group.step(-1);
    else if (event.key === ".") group.step(1);
    else if (/^[1-9]$/.test(event.key) && Number(event.key) <= group.videos.length) group.choose(Number(event.key) - 1);
    else return;
    event.preventDefault();
  });

  document.querySelectorAll("[data-sort]").forEach((select) => {
    select.addEventListener("change", () => {
      const list = document.querySelector("[data-player-list]");
      const sign = Number(select.selectedOptions[0].dataset.sign ?? 0);
      const key = (root) => {
        if (!select.value) return Number(root.dataset.order);
        return sign * (JSON.parse(root.dataset.gains)[select.value] ?? sign * Infinity); // without a score: last
      };
      [...list.children].sort((a, b) => key(a) - key(b)).forEach((root) => list.append(root));
    });
  });

  // What both observers said last decides: their reports may come together, or late.
  function watch(margin, name) {
    return new IntersectionObserver((entries) => {
      entries.forEach((entry) => {
        const group = groupOf.get(entry.target);
        group[name] = entry.isIntersecting;
        if (group.isNear) group.load("metadata");
        else if (!group.isAround) group.release();
      });
    }, { rootMargin: margin });
  }
  const watches = [watch(NEAR, "isNear"), watch(FAR, "isAround")];

  document.querySelectorAll("[data-players]").forEach((root) => {
    const group = new PlayerGroup(root);
    groups.push(group);
    groupOf.set(root, group);
    watches.forEach((observer) => observer.observe(root));
  });

  window.omninft = { groups, active, visit };
})();
