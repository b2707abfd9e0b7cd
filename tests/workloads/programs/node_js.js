// A hash chain on the main thread, its twin in a worker thread, timers, and a file appended through the thread pool.
"use strict";

const { createHash } = require("node:crypto");
const fs = require("node:fs");
const { Worker, isMainThread, parentPort } = require("node:worker_threads");

const EARLY_MS = 2; // libuv counts in whole milliseconds
const STATE_BYTES = 1 << 20;

function next(link, number) {
  return createHash("sha256").update(`${link} ${number}`).digest("hex");
}

function twin() {
  let link = "";
  let count = 0;
  parentPort.on("message", (number) => {
    if (number === "end") {
      parentPort.postMessage({ end: true, count });
      parentPort.close();
      return;
    }
    count += 1;
    link = next(link, number);
    parentPort.postMessage({ number, link });
  });
}

function main() {
  const pid = process.pid;
  process.chdir(process.argv[2]);
  const alive = fs.openSync("alive", "w");
  const chain = fs.openSync("chain", "a");
  const worker = new Worker(__filename);
  const state = Buffer.alloc(STATE_BYTES, 0);
  for (let i = 0; i < 16; i++) state[i] = (i * 37 + 11) & 255;
  for (let i = 16; i < STATE_BYTES; i++) state[i] = (i * 7 + (i >> 8)) & 255;
  let number = 0;
  let link = "";
  let ticks = 0;
  let answered = 0;
  const started = process.hrtime.bigint();
  let ended = false;

  function conclude(text) {
    if (ended) return;
    ended = true;
    fs.writeFileSync(`result.${pid}`, text + "\n");
    fs.renameSync(`result.${pid}`, "result");
    process.exit(text.startsWith("ok") ? 0 : 1);
  }
  function check(condition, text) {
    if (!condition) conclude(`bad: ${text}`);
  }

  process.on("uncaughtException", (error) => conclude(`bad: ${error}`));
  process.on("warning", (warning) => conclude(`bad: ${warning}`));
  worker.on("error", (error) => conclude(`bad: worker: ${error}`));

  const interval = setInterval(() => {
    ticks += 1;
    const elapsed = Number(process.hrtime.bigint() - started) / 1e6;
    check(ticks <= elapsed / 10 + 1, `${ticks} interval ticks in ${elapsed} ms`);
  }, 10);

  function verifyState() {
    for (let i = 16; i < STATE_BYTES; i += 1) {
      if (state[i] !== ((i * 7 + (i >> 8)) & 255)) conclude(`bad: byte ${i} of the state is ${state[i]}`);
    }
  }

  function verifyFile() {
    const lines = fs.readFileSync("chain", "utf8").split("\n");
    check(lines.pop() === "", "the chain ends in the middle of a line");
    let expected = "";
    lines.forEach((line, index) => {
      expected = next(expected, index + 1);
      check(line === `${index + 1} ${expected}`, `line ${index + 1} of the chain is ${line}`);
    });
    check(lines.length === number, `the chain has ${lines.length} links, ${number} were written`);
  }

  function finish(workerCount) {
    clearInterval(interval);
    verifyState();
    verifyFile();
    check(answered === number, `the worker answered ${answered} of ${number}`);
    check(workerCount === number, `the worker counted ${workerCount} of ${number}`);
    check(ticks > 0, "the interval timer never fired");
    conclude(`ok ${number} links, ${ticks} ticks`);
  }

  // One link: hash, append, ask the twin, wait a little, and only then the next.
  function step() {
    number += 1;
    link = next(link, number);
    if (number % 16 === 0) verifyState();
    check(process.pid === pid, `pid was ${pid}, is ${process.pid}`);
    fs.appendFile(chain, `${number} ${link}\n`, (error) => {
      check(!error, `append: ${error}`);
      worker.postMessage(number);
    });
  }

  worker.on("message", (message) => {
    if (message.end) {
      finish(message.count);
      return;
    }
    answered += 1;
    check(message.number === number && message.link === link, `the twin has another link ${message.number}`);
    fs.writeSync(alive, String(number).padStart(20, "0") + "\n", 0);
    const asked = process.hrtime.bigint();
    setTimeout(() => {
      const waited = Number(process.hrtime.bigint() - asked) / 1e6;
      check(waited >= 4 - EARLY_MS, `a timer of 4 ms fired after ${waited}`);
      if (fs.existsSync("stop")) worker.postMessage("end");
      else step();
    }, 4);
  });
  step();
}

if (isMainThread) main();
else twin();
